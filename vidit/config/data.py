"""Clips: the data sets, the shapes, how clips are cut and read."""

from typing import Literal, Self

from pydantic import Field

from vidit.config.section import NotNegative, Positive, Section


class Bucket(Section):
    """One shape of a run that trains on several."""

    num_frames: Positive
    height: Positive
    width: Positive
    rows: NotNegative = Field(
        0, description="clips in a micro-batch; 0 = as many as cost what train.micro_batch of the dearest do"
    )
    keep: float = Field(1.0, gt=0, le=1, description="chance that a clip which fits stays; else the next smaller one")
    weight: float = Field(1.0, gt=0, description="micro-batches drawn, next to as many as its clips fill")
    cost: float = Field(0.0, ge=0, description="what a row costs, such as measured seconds, of all or none; 0 = FLOPs")

    def rate(self, fps: float) -> float:
        """The frames a second of a clip of this shape as a model is told them: 0 of an image."""
        return fps if self.num_frames > 1 else 0.0


class Source(Section):
    """One data set of a mixture."""

    path: str = Field(min_length=1)
    weight: float = Field(gt=0, description="share of the clips drawn, next to the weights of the others")
    select: tuple[str, ...] = Field((), description="rules over its scores, besides those of data.select")

    @property
    def name(self) -> str:
        """What records put before the keys of its clips."""
        return self.path.rstrip("/").rpartition("/")[2]


class Data(Section):
    """Clips: where they are and how they are cut."""

    train: str = Field("", description="folder written by `vidit pack` or `vidit encode` (shards), or its URL")
    streaming: bool = Field(
        False, description="train is tars without an index, read from front to back: a folder, a pattern, a .txt"
    )
    shuffle_buffer: NotNegative = Field(0, description="clips of a reader's tars that are shuffled; 0 = in tar order")
    mixture: tuple[Source, ...] = Field((), description="several such folders and their weights, instead of train")
    buckets: tuple[Bucket, ...] = Field((), description="shapes to train on, instead of the one below")
    longest_first: bool = Field(
        False, description="of the buckets that it fills a clip takes the longest, not the largest, before the other"
    )
    packed_tokens: NotNegative = Field(
        0,
        description="most tokens of a packed row, in which clips of several buckets lie side by side (Sora, NaViT); "
        "0 = a row is a clip",
    )
    validation: str | None = Field(None, description="the same for validation; none = the last clips of train")
    num_validation: int = Field(64, ge=0, description="clips of fixed noise and timesteps in each validation")
    num_frames: int = Field(17, gt=0)
    height: int = Field(128, gt=0)
    width: int = Field(128, gt=0)
    select: tuple[str, ...] = Field((), description="rules over the scores of `vidit score`, such as 'motion >= q0.25'")
    fps: float = Field(0.0, ge=0, le=1000, description="frames a second after resampling; 0 keeps each clip's own")
    decoder: Literal["pyav", "torchcodec", "nvdec"] = Field(
        "pyav", description="torchcodec where that is installed; nvdec: torchcodec on the CUDA device of the rank"
    )
    random_crop: bool = Field(False, description="random crop and start (keyed); else the middle")
    horizontal_flip: float = Field(
        0.0, ge=0, le=1, description="chance that a clip is mirrored (keyed): left and right of its caption are not"
    )
    image_rows: int = Field(0, ge=0, description="rows of a micro-batch made of T independent images each")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="probability of the empty caption")
    cache_latents: bool = Field(False, description="encode every clip once, before the first step")
    num_workers: int = Field(1, ge=0)
    prefetch: int = Field(4, gt=0, description="micro-batches ready ahead of the step, per worker")
    max_skipped: float = Field(0.01, ge=0, le=1, description="fraction of clips that may fail to decode")
    cache_dir: str = Field("", description="local folder that keeps what was read from a URL; empty = nothing is kept")
    cache_gib: float = Field(32.0, gt=0, description="most that data.cache_dir holds; what was used longest ago goes")
    stall_s: float = Field(
        30.0, gt=0, description="how long a remote read waits for its next byte before it is retried"
    )
    patience_s: float = Field(
        300.0, gt=0, description="how long a remote read is retried without a byte; then an error"
    )

    @property
    def is_remote(self) -> bool:
        """Whether any of the clips lie behind a URL."""
        places = [source.path for source in self.mixture] + [self.train, self.validation or ""]
        is_list = self.streaming and self.train.endswith(".txt")  # of what, nobody has read yet
        return is_list or any("://" in place for place in places)

    @property
    def shown_fps(self) -> float:
        """Frames a second of videos that are made: those of the clips, or 8 where each clip keeps its own."""
        return self.fps or 8.0

    @property
    def drawn(self) -> str:
        """The options by which each reading of a clip gives another cut of it, as the command line has them."""
        options = {"data.random_crop=true": self.random_crop}
        options[f"data.horizontal_flip={self.horizontal_flip:g}"] = self.horizontal_flip > 0
        return " and ".join(option for option, is_set in options.items() if is_set)

    def undrawn(self) -> Self:
        """Without those: the middle of each clip, as it is."""
        return self.model_copy(update={"random_crop": False, "horizontal_flip": 0.0})

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data sets to train on."""
        return self.mixture or (Source(path=self.train, weight=1.0),)

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """The shapes to train on; validation and samples have num_frames, height and width."""
        return self.buckets or (Bucket(num_frames=self.num_frames, height=self.height, width=self.width),)
