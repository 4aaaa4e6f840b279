"""The videos in WebDataset tars that others made: one video and a .txt or .json a key, as video2dataset writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vidit.data.candidates import Candidate, Found, Place, place_of, plain_text, with_keys
from vidit.data.caption_table import Columns, row_beside
from vidit.data.limits import ClipError
from vidit.data.tar import VIDEO_SUFFIXES, Limits, Member, ShardError, read, scan

_Rejected = tuple[str, str]


def find_in_tars(folder: Path, tars: Sequence[Path], columns: Columns) -> Found:
    """Every video of every tar. A tar that is refused as a whole, and a key without exactly one video, are rejected.

    The caption is the text at ``columns.caption_name`` in the .json, else the .txt; the .json's other fields are
    the clip's origin.
    """
    candidates: list[Candidate] = []
    rejected: list[_Rejected] = []
    for tar in tars:
        name = plain_text(tar.relative_to(folder).as_posix())
        place = place_of(tar)
        try:
            clips = scan(tar, Limits())
        except (ShardError, OSError) as error:
            rejected.append((name, str(error)))
            continue
        for found in _clips_of(place or Place(tar, 0, 0), name, clips, columns):
            if isinstance(found, Candidate):
                candidates.append(found)
            else:
                rejected.append(found)
    return Found(with_keys(candidates), tuple(sorted(rejected)))


def _clips_of(
    tar: Place, name: str, clips: Mapping[str, Mapping[str, Member]], columns: Columns
) -> Iterator[Candidate | _Rejected]:
    for key, members in clips.items():
        videos = [member for suffix, member in members.items() if suffix in VIDEO_SUFFIXES]
        if len(videos) == 1:
            sidecar, text = (_content(tar.path, members.get(suffix)) for suffix in ("json", "txt"))
            row = row_beside(sidecar, text, columns)
            yield Candidate(replace(tar, member=videos[0]), f"{name}/{videos[0].name}", "", row.caption, row.origin)
        else:
            yield f"{name}/{key}", f"{len(videos)} videos under one key, 1 was expected"


def _content(tar: Path, member: Member | None) -> bytes | None:
    try:
        return read(tar, member) if member else None
    except (ShardError, ClipError, OSError):
        return None
