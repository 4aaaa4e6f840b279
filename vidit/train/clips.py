"""The clips of a run: which are for training and which for validation, which are usable, and the fixed batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from parallel.exchange import same_everywhere
from vidit.batching import clip_tokens
from vidit.config import ConfigError, RunConfig
from vidit.data.catalog import Catalog, LeftOut, catalogue
from vidit.data.clip_list import Clips
from vidit.data.curation.table import select_clips
from vidit.data.listing import Listing
from vidit.data.loader import Batch, MicroBatches
from vidit.data.remote import Reach
from vidit.data.shards import ClipRef, read_index
from vidit.data.stream_tars import Tars, find_tars
from vidit.data.torchcodec_window import require_decoder
from vidit.text.encoder import CaptionTokenizer
from vidit.train.encoding import require_same_cut
from vidit.train.fingerprint import Fingerprint, fingerprint


@dataclass(frozen=True)
class Split:
    """Clips that are long enough, those that are not with the reason, names of those whose picture is cropped."""

    catalog: Catalog
    dropped: LeftOut
    cropped: Listing[str]
    fingerprint: Fingerprint
    selection: tuple[str, ...] = ()
    """What each rule of `data.select` drops, for the log."""

    @property
    def refs(self) -> Sequence[ClipRef]:
        return self.catalog.refs

    def report(self) -> dict[str, Any]:
        """As data.json has it."""
        report = {"used": len(self.refs), **self.dropped.report("dropped"), **self.cropped.report("cropped")}
        return report | ({"select": self.selection} if self.selection else {})


@dataclass(frozen=True)
class StreamSplit(Split):
    """Tars whose clips nobody knows before they are read; its catalogue is empty."""

    tars: Tars = field(default_factory=lambda: Tars((), (), 0))

    @classmethod
    def of(cls, tars: Tars) -> "StreamSplit":
        known = Fingerprint(num_clips=len(tars), sha256=tars.sha256)
        return cls(Catalog.plain(()), LeftOut(), Listing(), known, tars=tars)

    def report(self) -> dict[str, Any]:
        return {"used": 0, "streamed_tars": len(self.tars), "dropped": [], "cropped": []}


Splits = tuple[Split, Split]


def fingerprints(splits: Splits) -> dict[str, Fingerprint]:
    """As the checkpoints of a run keep them."""
    train, validation = splits
    return {"train": train.fingerprint, "validation": validation.fingerprint}


def read_splits(config: RunConfig) -> Splits:
    """(training, validation): folders of their own, or the last `num_validation` clips of one; or a stream of tars.

    `data.select` chooses among the clips of each data set before they are split, so a validation that is taken from
    them is curated alike; a folder of its own is left as it is. Raises ShardError for a damaged dataset, ConfigError
    and ValueError where a split has no usable clip, ValueError where scores are missing.
    """
    d = config.data
    require_decoder(d.decoder)
    reach = Reach(d.cache_dir, d.cache_gib, d.stall_s, d.patience_s)
    if d.streaming:
        kept = read_index(d.validation, reach)[: d.num_validation] if d.validation else ()
        require_same_cut(config, (), kept)
        return StreamSplit.of(find_tars(d.train, config.train.seed, reach)), _held(kept, config)
    chosen = [select_clips(read_index(source.path, reach), (*d.select, *source.select)) for source in d.sources]
    sources: list[Sequence[ClipRef]] = [one.refs for one in chosen]
    validation: Sequence[ClipRef] = ()
    if d.validation:
        validation = read_index(d.validation, reach)[: d.num_validation]
    elif d.num_validation:
        (refs,) = sources
        if d.num_validation >= len(refs):
            num = d.num_validation
            raise ConfigError(
                [f"data.num_validation={num} leaves none of the {len(refs)} clips of {d.train} to train on"]
            )
        cut = len(refs) - d.num_validation
        sources, validation = [refs[:cut]], refs[cut:]
    require_same_cut(config, Clips.chained(sources), validation)
    train = _split(sources, config)
    unwanted = sum((one.dropped for one in chosen), LeftOut())
    train = replace(
        train, dropped=unwanted + train.dropped, selection=tuple(line for one in chosen for line in one.lines)
    )
    if not train.refs:
        where = " ".join(source.path for source in d.sources)
        raise ValueError(f"no clip of {where} is usable: {len(train.dropped)} dropped, {_first(train)}")
    held = _held(validation, config)
    train.catalog.schedule(config)
    return train, held


def _held(validation: Sequence[ClipRef], config: RunConfig) -> Split:
    held = _split([validation], alone(config))
    if held.dropped and not held.refs:
        raise ValueError(
            f"none of the {len(held.dropped)} validation clips of {config.data.validation or config.data.train} is "
            f"usable, {_first(held)}; give longer clips as data.validation, or data.num_validation=0 for no validation"
        )
    return held


def every_clip(config: RunConfig) -> Split:
    """The clips of the one data set of a run, those included that a run sets apart for validation.

    Raises what `read_splits` raises for them.
    """
    if config.data.streaming:
        raise ConfigError(["data.streaming=true knows no clip before it is read; pack the tars, or leave it out"])
    undivided = config.model_copy(
        update={"data": config.data.model_copy(update={"validation": None, "num_validation": 0})}
    )
    return read_splits(undivided)[0]


def _first(split: Split) -> str:
    key, reason = split.dropped.first
    return f"the first: {key}: {reason}"


def _split(sources: Sequence[Sequence[ClipRef]], config: RunConfig) -> Split:
    return Split(*catalogue(sources, config), fingerprint(Clips.chained(sources)))


def alone(config: RunConfig) -> RunConfig:
    """The config of a split of one data set and one shape, which validation has."""
    return config.model_copy(
        update={"data": config.data.model_copy(update={"buckets": (), "packed_tokens": 0, "mixture": ()})}
    )


class ClipsDifferError(RuntimeError):
    """Ranks that should read the same clips do not; raised on all of them."""

    shared = True


def require_same_clips(told: Sequence[Any], where: str, folder: str) -> None:
    """ClipsDifferError, on every rank, where ranks find other clips or have skipped other ones.

    `told` is what the data ranks told one another of their clips; every rank must call this.
    """
    if not same_everywhere(str(told)):
        raise ClipsDifferError(
            f"ranks that share rows were given other clips in {where}: {folder} is not the same, or not equally "
            "readable, everywhere; compare it between the machines"
        )


def fixed_batches(
    config: RunConfig,
    refs: Sequence[ClipRef],
    num: int,
    tokenizer: CaptionTokenizer | None,
    images_per_row: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """`num` of the clips, each once, in batches that never differ: no dropout, no image rows, middle crop.

    `num` is at most the number of clips; which they are is keyed by the run's seed. The batches are dealt to `world`
    ranks in rounds; in an unfinished last round the last batch goes to those that would have none, so that all
    ranks work the same number of times.
    """
    if not num:
        return
    limit, config = config.data.packed_tokens, alone(config)
    most = max(1, limit // clip_tokens(config, config.data.shapes[0])) if limit else config.train.micro_batch
    data = config.data.undrawn().model_copy(update={"image_rows": 0, "caption_dropout": 0.0})
    micro = max(n for n in range(1, most + 1) if num % n == 0)
    # A step of one micro-batch each: where the rows of a step begin does not depend on the number of ranks.
    train = config.train.model_copy(update={"micro_batch": micro, "global_batch": micro})
    config = config.model_copy(update={"data": data, "train": train})
    dataset = MicroBatches(config, Catalog.plain(refs), tokenizer, images_per_row)
    for first in range(0, num // micro, world):
        yield dataset[min(first + rank, num // micro - 1)]
