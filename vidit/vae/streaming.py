"""A video through the VAE in chunks of frames, in constant memory, with the numbers of one pass.

A stream works on a twin of the encoder or the decoder: the same parameters, but in the places of `Front` and
`DropFirst` stand modules that remember the last frames of the chunk before (WF-VAE's causal cache, 2411.17459,
section 3.3). The VAE itself is not touched: it may be used meanwhile, and have any number of streams.

Chunks may have any length. The encoder is given 1 frame, then multiples of the temporal stride; what is left over
waits for the next chunk. What is remembered is at most k_t - 1 frames for each convolution, whatever the length.
There is no backward pass through a stream.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from vidit.dtypes import widen
from vidit.vae.autoencoder import CausalVae, Posterior, posterior
from vidit.vae.convolution import joined
from vidit.vae.layers import DropFirst, Front


class Stream(Protocol):
    """What takes a video chunk by chunk, (B, C, any, H, W), and gives what is ready of its result, or None."""

    def push(self, chunk_BCTHW: Tensor) -> Tensor | None: ...

    def finish(self) -> None:
        """The video is over. ValueError where frames wait for more."""


class EncodeStream:
    """Pixels -> posterior parameters (B, 2c, T, H, W): mean and log variance, as `posterior` takes them."""

    def __init__(self, vae: CausalVae):
        self.vae, self.encoder = vae, twin(vae.encoder)
        self.stride = vae.config.temporal_stride
        self.started = False
        self.waiting: Tensor | None = None

    @torch.no_grad()
    def push(self, chunk_BCTHW: Tensor) -> Tensor | None:
        """RuntimeError where the size changes within a video, ValueError for one that the strides do not divide."""
        x = chunk_BCTHW if self.waiting is None else _joined(self.waiting, chunk_BCTHW)
        first = 0 if self.started else 1
        whole = first + max(0, x.shape[2] - first) // self.stride * self.stride
        if whole > x.shape[2] or not whole:
            self.waiting = x
            return None
        # A view of the chunk would keep all of it in memory.
        self.waiting = x[:, :, whole:].clone() if whole < x.shape[2] else None
        x = x[:, :, :whole]
        self.vae.check_size(torch.Size((1, *x.shape[-2:])))
        self.started = True
        return cast(Tensor, self.encoder(x.to(self.vae.dtype)))

    def finish(self) -> None:
        """ValueError where the video is not 1 + a multiple of the temporal stride long."""
        if self.waiting is not None:
            raise ValueError(
                f"{self.waiting.shape[2]} frames are left over at the end of the video: its length must be 1 + a "
                f"multiple of the VAE's temporal stride {self.stride}; drop them, or repeat the last frame"
            )


class DecodeStream:
    """Raw latents -> pixels, at least fp32: every latent frame gives its own frames at once."""

    def __init__(self, vae: CausalVae):
        self.vae, self.decoder = vae, twin(vae.decoder)

    @torch.no_grad()
    def push(self, chunk_BCTHW: Tensor) -> Tensor | None:
        """RuntimeError where the size changes within a video."""
        return widen(self.decoder(chunk_BCTHW.to(self.vae.dtype))) if chunk_BCTHW.shape[2] else None

    def finish(self) -> None:
        """Nothing waits."""


def stream_encode(vae: CausalVae, chunks_BCTHW: Iterable[Tensor]) -> Iterator[Posterior]:
    """Posteriors of a video that comes in chunks, pixels (B, 3, any, H, W); together those of the whole.

    Raises ValueError at the end where the frames are not 1 + a multiple of the temporal stride.
    """
    for part in _through(EncodeStream(vae), chunks_BCTHW):
        yield posterior(part)


def stream_decode(vae: CausalVae, chunks_BCTHW: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pixels of a raw latent that comes in chunks (B, c, any, H, W); together those of the whole."""
    return _through(DecodeStream(vae), chunks_BCTHW)


def _through(stream: Stream, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in chunks:
        part = stream.push(chunk)
        if part is not None:
            yield part
    stream.finish()


def twin(module: nn.Module) -> nn.Module:
    """A copy with the same parameters and buffers that takes the parts of one video, one after the other."""
    shared = [*module.parameters(), *module.buffers()]
    made = copy.deepcopy(module, {id(t): t for t in shared})
    for name, found in list(made.named_modules()):
        if isinstance(found, Front | DropFirst):
            owner, _, own_name = name.rpartition(".")
            cached = CachedFront(found) if isinstance(found, Front) else DropOnce(found)
            setattr(made.get_submodule(owner), own_name, cached)
    return made


class CachedFront(nn.Module):
    """The frames in front of x: those of `Front` the first time, then the last ones that were there."""

    def __init__(self, front: Front):
        super().__init__()
        self.front = front
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        given, past = self.front(x) if self.last is None else self.last, self.front.past
        # Of a short part some of what was in front of it is in front of the next one too.
        kept = x[:, :, max(0, x.shape[2] - past) :] if past else x[:, :, :0]
        if kept.shape[2] < past:
            kept = joined((given[:, :, given.shape[2] - (past - kept.shape[2]) :], kept), dim=2)
        self.last = kept.clone(memory_format=torch.preserve_format)
        return cast(Tensor, given)


class DropOnce(nn.Module):
    """`DropFirst` on the first part of a video; later ones keep all of theirs."""

    def __init__(self, drop: DropFirst):
        super().__init__()
        self.drop = drop
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        first, self.started = not self.started, True
        return cast(Tensor, self.drop(x)) if first else x


def _joined(waiting: Tensor, chunk: Tensor) -> Tensor:
    if waiting.shape[:2] != chunk.shape[:2] or waiting.shape[3:] != chunk.shape[3:]:
        raise RuntimeError(
            f"a chunk of shape {tuple(chunk.shape)} follows one of {tuple(waiting.shape)}: rows, channels and size "
            "stay the same within a video; cut or resize the frames before"
        )
    return torch.cat((waiting, chunk), dim=2)
