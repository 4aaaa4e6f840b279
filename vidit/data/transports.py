"""Where remote bytes come from: HTTP by aiohttp, everything else by fsspec; one try at a time.

Only the protocols of ``PROTOCOLS`` are opened: none that reads local files, runs a command or chains others
(fsspec's ``::``). HTTP must answer a request for a range with that range (206). Redirects are followed to http and
https only, and from https to https only. A failure that another try may not meet is a TransientError, any other a
ShardError; ``vidit/data/retries.py`` tries again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from vidit.data.limits import ShardError
from vidit.data.retries import LEAST_RATE, TransientError

if TYPE_CHECKING:
    from aiohttp import ClientResponse

# Protocol -> (the package that reads it, how it is installed).
PROTOCOLS = {
    "http": ("aiohttp", "pip install aiohttp"),
    "https": ("aiohttp", "pip install aiohttp"),
    "s3": ("s3fs", 'pip install -e ".[s3]"'),
    "gs": ("gcsfs", 'pip install -e ".[gs]"'),
    "az": ("adlfs", 'pip install -e ".[az]"'),
    "memory": ("fsspec", "pip install fsspec"),
}
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_MAX_REDIRECTS = 5
_LONGEST_WAIT_S = 3600.0


class Transport(Protocol):
    """The files of one remote folder. Both methods make one try and raise TransientError or ShardError."""

    async def fetch(self, name: str, offset: int, size: int, into: bytearray, stall_s: float) -> None:
        """Append to ``into`` what it lacks of ``size`` bytes from ``offset``; it keeps what came before a failure."""

    async def size(self, name: str, stall_s: float) -> int:
        """The bytes of a file."""


def check_url(url: str) -> None:
    """ValueError for an address that is not opened, with the reason."""
    protocol, _, rest = url.partition("://")
    known = " ".join(f"{name}://" for name in PROTOCOLS)
    if protocol not in PROTOCOLS:
        raise ValueError(f"{url}: {protocol}:// is not read; give a local folder or one of {known}")
    if "::" in url or not rest.strip("/"):
        raise ValueError(f"{url} is not the address of a folder; give one such as {protocol}://HOST/FOLDER")
    if re.search(r"[?#\s]", url) or ".." in rest.split("/"):
        raise ValueError(f"{url}: a folder's address has no ?, #, space or ..; file names are added to its end")
    if "@" in urlsplit(url).netloc:
        raise ValueError(
            f"{protocol}://...@{rest.rpartition('@')[2]}: no password belongs in an address, which is logged; use "
            "~/.netrc (http) or the environment variables and files of the storage's own tools"
        )


def transport_of(url: str) -> Transport:
    """The transport of an address. ValueError for one that ``check_url`` refuses or whose package is missing."""
    check_url(url)
    protocol = url.partition("://")[0]
    import fsspec  # here, since a run on local files needs none of this

    try:
        if protocol in ("http", "https"):
            return HttpTransport(url, fsspec.filesystem("http", client_kwargs={"trust_env": True}))
        return ObjectTransport(url, fsspec.filesystem(protocol))
    except ImportError as error:
        package, install = PROTOCOLS[protocol]
        raise ValueError(f"{url}: {protocol}:// needs the package {package}: {install} ({error})") from error


class HttpTransport:
    """A folder on a web server that serves byte ranges. fsspec keeps the session and the loop it lives in."""

    def __init__(self, url: str, system: Any) -> None:
        self.url, self.system = url, system

    async def fetch(self, name: str, offset: int, size: int, into: bytearray, stall_s: float) -> None:
        async with self._get(name, offset + len(into), offset + size - 1, stall_s) as response:
            async for chunk in response.content.iter_any():
                into += chunk[: size - len(into)]
                if len(into) == size:
                    return  # what a server sends beyond is never read
        raise TransientError(f"the answer broke off after {len(into)} of {size} bytes")

    async def size(self, name: str, stall_s: float) -> int:
        async with self._get(name, 0, 0, stall_s) as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if not total.isascii() or not total.isdigit():
                raise ShardError(f"{self.url}/{name}: the server does not say how long it is (Content-Range: {total})")
            return int(total)

    @asynccontextmanager
    async def _get(self, name: str, first: int, last: int, stall_s: float) -> AsyncIterator[ClientResponse]:
        import aiohttp

        url = f"{self.url}/{name}"
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=stall_s, sock_read=stall_s)
        session = await self.system.set_session()
        patience = stall_s + (last + 1 - first) / LEAST_RATE
        try:
            # The client's own time-outs are for each byte; this one ends a try whatever it waits for.
            async with (
                asyncio.timeout(patience),
                session.get(url, headers=headers, timeout=timeout, max_redirects=_MAX_REDIRECTS) as response,
            ):
                _check_answer(url, response, first, last)
                yield response
        except (
            aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError,
            aiohttp.TooManyRedirects,
        ) as error:  # fmt: skip
            raise ShardError(f"{url} cannot be opened: {_words(error)}; correct the address or the server") from error
        except TimeoutError as error:
            raise TransientError(f"nothing came for {stall_s:.3g} s, or not all in {patience:.3g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TransientError(_words(error)) from error


def _check_answer(url: str, response: ClientResponse, first: int, last: int) -> None:
    """ShardError or TransientError unless the answer is the range that was asked for."""
    status = response.status
    if url.startswith("https:") and any(hop.url.scheme != "https" for hop in (*response.history, response)):
        raise ShardError(f"{url} is redirected from https to http; give an address that stays encrypted")
    if status in _AGAIN:
        after = response.headers.get("Retry-After", "")
        wait = min(float(after), _LONGEST_WAIT_S) if re.fullmatch(r"[0-9]{1,9}", after) else 0.0
        raise TransientError(f"HTTP {status} {response.reason}", wait)
    if status == 200:
        raise ShardError(f"{url}: the server ignores byte ranges; use one that serves them (nginx, Apache, S3)")
    if status != 206:
        raise ShardError(f"{url}: HTTP {status} {response.reason} for bytes {first} to {last}; check the address")
    found = response.headers.get("Content-Range", "")
    if not found.startswith(f"bytes {first}-"):
        raise TransientError(f"bytes {first} to {last} were asked for, {found or 'no range'!r} came")


class ObjectTransport:
    """A folder of an object store, through its fsspec file system."""

    def __init__(self, url: str, system: Any) -> None:
        self.url, self.system = url, system

    async def fetch(self, name: str, offset: int, size: int, into: bytearray, stall_s: float) -> None:
        # The file system hands over a range whole, so that only its end can be waited for.
        patience = stall_s + size / LEAST_RATE
        found = await self._ask("cat_file", name, patience, start=offset + len(into), end=offset + size)
        into += found[: size - len(into)]
        if len(into) < size:
            raise TransientError(f"the answer broke off after {len(into)} of {size} bytes")

    async def size(self, name: str, stall_s: float) -> int:
        return int((await self._ask("info", name, stall_s))["size"])

    async def _ask(self, method: str, name: str, timeout_s: float, **options: int) -> Any:
        url = f"{self.url}/{name}"
        try:
            if not self.system.async_impl:
                return getattr(self.system, method)(url, **options)
            return await asyncio.wait_for(getattr(self.system, f"_{method}")(url, **options), timeout_s)
        except TimeoutError as error:
            raise TransientError(f"no answer for {timeout_s:.3g} s") from error
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError) as error:
            raise ShardError(f"{url} cannot be read: {_words(error)}; check the address and the credentials") from error
        # Each store has exceptions of its own; what is for ever ends with the budget too.
        except Exception as error:
            raise TransientError(_words(error)) from error


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
