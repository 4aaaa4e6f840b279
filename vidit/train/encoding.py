"""What a set of latents was made with, and whether a run fits it.

A run that takes stored latents must give the numbers that it would give on the videos. So whatever decides them is
written down when they are made and compared before they are used: the weights of the VAE's encoder, the frozen text
encoder with its tokenizer, the rate and the shapes of the cut. The decoder and the latent statistics may change: raw
latents are stored, and whitened by the run. Paths are for people and not compared.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from parallel.exchange import from_first
from vidit.config import ConfigError, RunConfig, SecondText, Text
from vidit.data.clip_list import Clips
from vidit.data.encoded import Encoding, read_encoding
from vidit.data.shards import ClipRef
from vidit.data.storage import Folder
from vidit.data.tar import LATENT_SUFFIX
from vidit.text.encoder import TextEncoder
from vidit.text.pair import PairTextEncoder
from vidit.vae.autoencoder import Autoencoder

PROBE = ("", "A red fox, 3 cats & an owl: déjà vu!")
"""Captions whose tokens tell tokenizers apart."""
Facts = dict[str, Any]


def vae_facts(config: RunConfig, vae: Autoencoder) -> Facts:
    return {"encoder_sha256": weights_digest(*vae.identity()), "weights": config.vae.weights}


def text_facts(config: RunConfig, text: TextEncoder | None) -> Facts | None:
    """Of a frozen encoder; None where captions are stored as they are, since what reads them is trained."""
    if text is None or text.trainable:
        return None
    if not isinstance(text, PairTextEncoder):
        return _encoder_facts(config.text, text)
    second = _encoder_facts(config.text.second, text.second) | {"tokens": text.second_tokens}
    return _encoder_facts(config.text, text.first) | {"second": second}


def _encoder_facts(c: Text | SecondText, text: TextEncoder) -> Facts:
    tokens = text.tokenize(PROBE)
    hashed = hashlib.sha256(json.dumps([tokens.ids.tolist(), tokens.mask_BL.tolist()]).encode())
    # In bf16: the same whether the weights are held in that or in more.
    hashed.update(weights_digest(text, torch.bfloat16).encode())
    facts = {"kind": c.kind, "max_tokens": c.max_tokens, "sha256": hashed.hexdigest()}
    # Both are in the digest already; told apart, they say what to change.
    if isinstance(c, Text) and c.kind == "llama":
        facts |= {"template": c.template, "hidden_layer": c.hidden_layer}
    return facts | {"path": c.path, "revision": c.revision}


def weights_digest(module: nn.Module, dtype: torch.dtype) -> str:
    """SHA-256 over every tensor of a module, in a dtype."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        hashed.update(f"{name} {list(tensor.shape)} ".encode())
        hashed.update(tensor.detach().cpu().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def encodings_of(refs: Sequence[ClipRef]) -> dict[Folder, Encoding]:
    """The folders among those of the clips that hold latents, and what these were made with."""
    found: dict[Folder, Encoding] = {}
    for folder in Clips.of(refs).folders_with(LATENT_SUFFIX):
        encoding = read_encoding(folder)
        if encoding is None:
            raise ValueError(
                f"{folder} holds latents without a manifest that says what made them; fetch its dataset.json, or run "
                "`vidit encode` again"
            )
        found[folder] = encoding
    return found


def require_same_cut(config: RunConfig, train: Sequence[ClipRef], validation: Sequence[ClipRef]) -> None:
    """ConfigError where clips that are latents were cut otherwise than the run cuts its videos."""
    d = config.data
    shapes = [(shape.num_frames, shape.height, shape.width) for shape in d.shapes]
    faults = []
    for folder, encoding in encodings_of(train).items():
        faults += list(_cut_faults(config, str(folder), encoding.facts, shapes))
    own = (d.num_frames, d.height, d.width)
    for folder, encoding in encodings_of(validation).items():
        faults += list(_cut_faults(config, str(folder), encoding.facts, [own], "validation has"))
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))


def _cut_faults(
    config: RunConfig, folder: str, facts: Facts, shapes: Sequence[tuple[int, int, int]], who: str = "the run has"
) -> Iterator[str]:
    d = config.data
    if config.train.task == "vae":
        yield f"{folder} holds latents, and train.task=vae learns from pixels; give the folder that they were made of"
    if d.drawn:
        yield f"{folder} holds one cut of each clip, which {d.drawn} contradicts; leave it out"
    if d.image_rows and not config.vae.first_frame_alone:
        yield (
            f"{folder} holds latents, whose first frame stands for an image, and that of {config.vae.kind} has seen "
            f"other frames: data.image_rows={d.image_rows} needs videos; set data.image_rows=0, or give the videos"
        )
    if d.cache_latents:
        yield f"data.cache_latents=true has no effect on {folder}, which holds latents already; leave it out"
    if facts["fps"] != d.fps:
        yield f"{folder} was encoded with data.fps={facts['fps']:g}, the run has {d.fps:g}; {_cure('data.fps')}"
    strange = [tuple(shape) for shape in facts["shapes"] if tuple(shape) not in shapes]
    if strange:
        yield (
            f"{folder} was encoded in {_shown(strange)} (frames x height x width), {who} {_shown(shapes)}; "
            f"{_cure('data.num_frames, height, width or buckets')}"
        )


def require_same_encoders(
    config: RunConfig, refs: Sequence[ClipRef], vae: Autoencoder, text: TextEncoder | None
) -> None:
    """ConfigError, on every rank, where clips that are latents were made with other weights than the run has."""
    encodings = encodings_of(refs)
    if not encodings:
        return
    own_vae = from_first(lambda: vae_facts(config, vae))
    own_text = from_first(lambda: text_facts(config, text))
    faults = []
    for folder, encoding in encodings.items():
        faults += list(_encoder_faults(str(folder), encoding.facts, own_vae, own_text))
    if faults:
        raise ConfigError(faults)


def _encoder_faults(folder: str, facts: Facts, vae: Facts, text: Facts | None) -> Iterator[str]:
    made = facts["vae"]
    if made["encoder_sha256"] != vae["encoder_sha256"]:
        yield (
            f"{folder} was encoded by the VAE {_name(made, 'weights', 'encoder_sha256')}, "
            f"the run has {_name(vae, 'weights', 'encoder_sha256')}; {_cure('vae.weights')}"
        )
    stored = facts["text"]
    # Captions are stored too: a trained encoder reads them, and so does a frozen one where no text is stored.
    if stored and text and comparable(stored) != comparable(text):
        yield (
            f"{folder} holds the text of {_text_name(stored)}, the run has {_text_name(text)}; "
            f"{_cure('the section text')} (with text.kind=bytes it stores captions only, which any encoder reads)"
        )


def differences(made: Facts, wanted: Facts) -> list[str]:
    """What two sets were not made with alike, both values named; nothing where one is as good as the other."""
    told = []
    for name in sorted(made.keys() | wanted.keys()):
        before, after = made.get(name), wanted.get(name)
        if comparable(before) != comparable(after):
            told.append(f"{name}: {json.dumps(before)}, now {json.dumps(after)}")
    return told


def comparable(value: Any) -> Any:
    """A fact without what only says where something lies."""
    if not isinstance(value, dict):
        return value
    kept = {name: part for name, part in value.items() if name not in ("weights", "path", "revision", "folder")}
    return {name: comparable(part) for name, part in kept.items()}


def _name(facts: Facts, path: str, digest: str) -> str:
    return f"{facts[path]} ({facts[digest][:12]})"


def _text_name(facts: Facts) -> str:
    told = f"{facts['kind']} {_name(facts, 'path', 'sha256')} at text.max_tokens={facts['max_tokens']}"
    if "template" in facts:
        told += f", template={facts['template']!r}, hidden_layer={facts['hidden_layer']}"
    if not (second := facts.get("second")):
        return told
    read = "tokens and pooled caption" if second["tokens"] else "pooled caption"
    return (
        f"{told} with the {read} of {second['kind']} {_name(second, 'path', 'sha256')} at text.second.max_tokens="
        f"{second['max_tokens']}"
    )


def _shown(shapes: Sequence[Sequence[int]]) -> str:
    return " ".join("x".join(map(str, shape)) for shape in shapes)


def _cure(option: str) -> str:
    return f"change {option}, or encode again"
