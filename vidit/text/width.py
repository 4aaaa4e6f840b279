"""How many numbers a token's features have, before an encoder is built: for counts, costs and cuts. No torch.

A pretrained encoder brings its own width, which the `config.json` of its folder says. Of a hub name, or of a folder
that is not there, nothing is known: then a number stands in, and `Captions.unknown` says for which option. Every rank
builds the encoder from that folder, so all of them find the same here.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from vidit.config import RunConfig

# What the classes of transformers take where a file does not say it.
DEFAULT_WIDTHS = {"t5": 512, "umt5": 512, "clip": 512, "llama": 4096}


class Captions(NamedTuple):
    """Tokens and width of a caption's features, and of the second encoder's, 0 each where there is none.

    unknown: options whose encoder's width is not known here.
    """

    tokens: int
    width: int
    second: tuple[int, int]
    unknown: tuple[str, ...]


def captions_of(config: RunConfig) -> Captions:
    """What the denoiser is given of a caption.

    Where files do not tell: `text.width` stands in, for the second encoder `model.pooled_width`, which is its width
    by definition, or else that of the first.
    """
    text, second, unknown = config.text, config.text.second, []
    width = text.width if text.kind == "bytes" else stored_width(text.kind, text.path, text.revision)
    if width is None:
        unknown.append("text.path")
    found = stored_width(second.kind, second.path, second.revision) if text.has_second else None
    if text.has_second and not (found or config.model.pooled_width):
        unknown.append("text.second.path")
    return _captions(config, width, found, tuple(unknown))


def captions_by_config(config: RunConfig) -> Captions:
    """The same with what stands in, whatever the files say: the order of a run's clips may not depend on files."""
    return _captions(config, None, None, ())


def _captions(config: RunConfig, width: int | None, found: int | None, unknown: tuple[str, ...]) -> Captions:
    text = config.text
    first = width or text.width
    seconds = (0, 0)
    if text.has_second:
        seconds = text.second.max_tokens, found or config.model.pooled_width or first
    return Captions(text.max_tokens, first, seconds, unknown)


def stored_width(kind: str, path: str | None, revision: str | None) -> int | None:
    """The width of an encoder in a local folder; None of a hub name, and where no file says it."""
    if path is None or revision is not None:
        return None
    try:
        facts = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = _width(kind, facts) if isinstance(facts, dict) else None
    return found if type(found) is int and found > 0 else None


def _width(kind: str, facts: dict[str, Any]) -> Any:
    """As said by a T5, a LLaMA, a CLIP text tower, or a whole CLIP with one (older files have it in two places)."""
    if kind in ("t5", "umt5"):
        return facts.get("d_model", DEFAULT_WIDTHS[kind])
    if facts.get("model_type") == "clip":
        towers = [facts.get(name) or {} for name in ("text_config_dict", "text_config")]
        facts = next((tower for tower in towers if isinstance(tower, dict) and "hidden_size" in tower), {})
    return facts.get("hidden_size", DEFAULT_WIDTHS[kind])
