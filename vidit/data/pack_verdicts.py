"""Whether a candidate becomes a clip: its caption, what decoding it found out, the rules, and what came before it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from vidit.data.candidates import Candidate, Found
from vidit.data.captions import CaptionError, clean_caption
from vidit.data.pack_journal import Examined, Journal, examine, unexamined
from vidit.data.video import VideoInfo
from vidit.data.workers import mapped


@dataclass(frozen=True, slots=True)
class Rules:
    """What a clip must be. ``min_side`` in pixels, as shown; ``drop_duplicates``: unlike all clips before it."""

    min_frames: int = 1
    min_side: int = 16
    allow_empty_captions: bool = False
    drop_duplicates: bool = False


@dataclass(frozen=True, slots=True)
class Clip:
    """A candidate that is kept, with its sidecar; size and SHA-256 are of the video."""

    candidate: Candidate
    sidecar: dict[str, Any]
    num_bytes: int
    sha256: str


@dataclass(slots=True)
class Tally:
    """How far a packing is, in files. ``decoded`` counts what this process decoded, not what an earlier one had."""

    total: int
    kept: int = 0
    rejected: int = 0
    decoded: int = 0
    decoded_bytes: int = 0

    @property
    def done(self) -> int:
        return self.kept + self.rejected


Watch = Callable[[Tally], None]


@dataclass(slots=True)
class Outcome:
    """What became of the candidates so far; lists as PackReport has them."""

    rejected: list[tuple[str, str]]
    kept: list[str] = field(default_factory=list)
    cleaned: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Case:
    """A candidate on its way to a verdict; ``fault`` is what speaks against it before it is decoded."""

    item: Candidate
    caption: str = ""
    fault: str = ""
    examined: Examined | None = None

    @property
    def must_be_examined(self) -> bool:
        return not self.fault and self.examined is None


class Judge:
    """Goes through what a source holds, in order; ``outcome`` tells what became of each candidate so far."""

    def __init__(self, found: Found, rules: Rules, journal: Journal, workers: int, watch: Watch) -> None:
        self._found, self._rules, self._journal = found, rules, journal
        self._workers, self._watch = workers, watch
        self._first_of: dict[bytes, str] = {}
        self.outcome = Outcome(list(found.rejected))

    def clips(self) -> Generator[Clip, None, None]:
        """The clips to keep. ``workers`` processes decode what the journal does not know, and it learns of each."""
        rejected = len(self._found.rejected)
        tally = Tally(len(self._found.candidates) + rejected, rejected=rejected)
        cases = [self._opened(item) for item in self._found.candidates]
        places = [case.item.place for case in cases if case.must_be_examined]
        results = mapped(examine, places, self._workers, unexamined)
        for case in cases:
            if case.must_be_examined:
                case.examined = next(results)
                self._journal.note(case.item.place, case.examined)
                tally.decoded += 1
                tally.decoded_bytes += case.examined.num_bytes
            clip = self._clip(case)
            tally.kept += clip is not None
            tally.rejected += clip is None
            self._watch(tally)
            if clip:
                yield clip

    def _opened(self, item: Candidate) -> _Case:
        try:
            caption, changes = clean_caption(item.caption, allow_empty=self._rules.allow_empty_captions)
        except CaptionError as error:
            return _Case(item, fault=str(error))
        if changes:
            self.outcome.cleaned.append((item.name, changes))
        return _Case(item, caption, examined=self._journal.known(item.place))

    def _clip(self, case: _Case) -> Clip | None:
        """The verdict on a case, which is noted; None for a rejection."""
        examined = case.examined
        reason = self._fault(case.item, examined) if examined else case.fault
        if reason or not examined or not examined.info:
            self.outcome.rejected.append((case.item.name, reason))
            return None
        self.outcome.kept.append(case.item.name)
        sidecar = _sidecar(case.item, case.caption, examined.info)
        return Clip(case.item, sidecar, examined.num_bytes, examined.sha256)

    def _fault(self, item: Candidate, examined: Examined) -> str:
        """What speaks against a video; empty if nothing does."""
        fault = self._shortfall(examined.info) if examined.info else examined.reason
        if fault:
            return fault
        first = self._first_of.setdefault(bytes.fromhex(examined.sha256), item.name)
        if first == item.name:
            return ""
        self.outcome.duplicates.append((item.name, first))
        return f"the same bytes as {first}" if self._rules.drop_duplicates else ""

    def _shortfall(self, info: VideoInfo) -> str:
        if info.num_frames < self._rules.min_frames:
            return f"{info.num_frames} frames, min_frames is {self._rules.min_frames}"
        if min(info.width, info.height) < self._rules.min_side:
            return f"{info.width}x{info.height} pixels, min_side is {self._rules.min_side}"
        return ""


def _sidecar(item: Candidate, caption: str, info: VideoInfo) -> dict[str, Any]:
    return {
        "caption": caption,
        "fps": info.fps,
        "num_frames": info.num_frames,
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "file": item.name,
        "origin": item.origin,
    }
