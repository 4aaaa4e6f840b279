"""The tars of a stream: what `data.train` names with `data.streaming`, and which of them stands at which place.

Nothing but their addresses is known. Epoch e is a permutation of the tars keyed by (seed, e), and place p of the
endless stream is entry p mod n of epoch p // n. Reader r of R reads the places r, r + R, r + 2R and so on, so every tar
is read once an epoch whatever the number of readers.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vidit.data.order import epoch_order
from vidit.data.remote import Reach, RemoteFile, RemoteFolder
from vidit.data.storage import File, is_remote
from vidit.data.transports import check_url

MAX_TARS = 1_000_000
_FORMS = "give a folder of tars, a tar, a pattern such as clips/{00000..01023}.tar, or a .txt that lists tars"


@dataclass(frozen=True)
class Tars:
    """Addresses in the order of the list, and what each is called in records: its address without what all share."""

    files: tuple[File, ...]
    names: tuple[str, ...]
    seed: int
    _order: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)
    """Of the epoch that was asked for last."""

    def __len__(self) -> int:
        return len(self.files)

    def __reduce__(self) -> tuple[object, ...]:
        return Tars, (self.files, self.names, self.seed)

    def number(self, place: int) -> int:
        """Which tar of the list stands at a place."""
        epoch, offset = divmod(place, len(self))
        if epoch not in self._order:
            self._order.clear()
            self._order[epoch] = epoch_order(self.seed, "tars", epoch, len(self))
        return int(self._order[epoch][offset])

    def file(self, place: int) -> File:
        return self.files[self.number(place)]

    def name(self, place: int) -> str:
        return self.names[self.number(place)]

    @cached_property
    def sha256(self) -> str:
        """Of the names in their order: what a resume compares. A folder may be moved; contents are not known."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()


def find_tars(train: str, seed: int, reach: Reach) -> Tars:
    """The tars that `data.train` names: a folder, a tar, a brace pattern, or a .txt with one of these but a folder a
    line. Raises ValueError for what is no tar, is there twice or is not there, and for a URL that is not opened.
    """
    addresses = list(islice(_addresses(train), MAX_TARS + 1))
    if len(addresses) > MAX_TARS:
        raise ValueError(f"data.train={train} names more than {MAX_TARS} tars; a run takes at most that many")
    if not addresses:
        raise ValueError(f"data.train={train} names no tar; {_FORMS}")
    if repeated := [address for address, count in Counter(addresses).items() if count > 1]:
        raise ValueError(f"data.train={train} names {repeated[0]} more than once; an epoch reads each tar once")
    folders: dict[str, RemoteFolder] = {}
    return Tars(tuple(_file(address, folders, reach) for address in addresses), _names(addresses), seed)


def _addresses(train: str) -> Iterator[str]:
    if is_remote(train):
        yield from _expanded(train)
        return
    path = Path(train)
    if path.is_dir():
        yield from (str(item) for item in sorted(path.iterdir()) if item.name.endswith(".tar"))
    elif train.endswith(".txt"):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.train={train} cannot be read as a list of tars: {error}") from error
        for line in filter(None, map(str.strip, lines)):
            yield from _expanded(line if is_remote(line) else str(path.parent / line))
    else:
        yield from _expanded(train)


def _expanded(pattern: str) -> Iterator[str]:
    from braceexpand import braceexpand  # here, since few runs need it

    try:
        yield from braceexpand(pattern)
    except ValueError as error:
        raise ValueError(f"{pattern}: its braces do not match: {error}; {_FORMS}") from error


def _file(address: str, folders: dict[str, RemoteFolder], reach: Reach) -> File:
    if not address.endswith(".tar"):
        raise ValueError(f"{address} does not end in .tar, and a URL cannot be listed; {_FORMS} (unpack a .tar.gz)")
    if not is_remote(address):
        path = Path(address)
        if not path.is_file():
            raise ValueError(f"{address} is not a file; {_FORMS}")
        return path
    url, _, name = address.rpartition("/")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{address}: a tar's name has letters, digits, _ . and - only; rename it")
    if url not in folders:
        check_url(url)
        folders[url] = RemoteFolder(url, reach)
    return RemoteFile(folders[url], name)


def _names(addresses: Sequence[str]) -> tuple[str, ...]:
    shared = min(addresses), max(addresses)
    length = next((i for i, (a, b) in enumerate(zip(*shared, strict=False)) if a != b), len(shared[0]))
    start = shared[0].rfind("/", 0, length) + 1
    return tuple(address[start:] for address in addresses)
