"""What a family of models is called in diffusers: its class, its geometry, its names.

A table says everything about names (`outside`, `block`); what is not in it is an error, in either direction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vidit.config import Model
from vidit.export.diffusers.forms import SAME, Form


class Geometry(NamedTuple):
    """What a denoiser is built from: its config, latent channels, width of the text features.

    `latent` (T, H, W) and `text_tokens` are the sizes that it is used at, which no weight depends on; their classes
    keep them, ours do not.
    """

    model: Model
    channels: int
    text_width: int
    latent: tuple[int, int, int] | None = None
    text_tokens: int | None = None


class Place(NamedTuple):
    """Where a parameter, or all parameters of a module, lie in their model."""

    names: tuple[str, ...]
    form: Form = SAME


def at(*names: str, form: Form = SAME) -> Place:
    return Place(names, form)


# What only some families have: elsewhere it has to be at its default.
EXTRAS = (
    "pooled_text", "pooled_embedding", "pooled_width", "guidance", "num_refiner_layers", "num_single_layers",
    "text_weights", "rope_theta", "frame_rate", "cross_text", "text_embedding",
)  # fmt: skip


def require_same_channels(config: Mapping[str, Any]) -> None:
    """ValueError for a model of theirs that is given more than the noisy latent, such as an image."""
    if config["out_channels"] not in (None, config["in_channels"]):
        raise ValueError(
            f"{config['in_channels']} channels in and {config['out_channels']} out: only text-to-video models, whose "
            "input is the noisy latent alone, can be read"
        )


@dataclass(frozen=True)
class Family:
    """One class of diffusers.

    name: of the family here.
    cls: of the class there.
    fields: of `Model`, what all members have.
    fixed: of their config.json, what all members have.
    read: their config.json -> geometry.
    write: geometry -> what differs between members in their config.json.
    layers: prefixes of their blocks, which ours fill in turn: {} is the number.
    outside, block: our name, of a parameter or a module, without its block's prefix -> theirs. A number within is * in
        ours and {} in theirs.
    single_layer, single: the same of single-stream blocks.
    free: extras that members choose.
    """

    name: str
    cls: str
    fields: Mapping[str, Any]
    fixed: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], Geometry]
    write: Callable[[Geometry], dict[str, Any]]
    layers: tuple[str, ...]
    outside: Mapping[str, Place]
    block: Mapping[str, Place]
    single_layer: str = ""
    single: Mapping[str, Place] = field(default_factory=dict)
    free: tuple[str, ...] = ()

    def place(self, name: str, c: Model) -> Place:
        """Where a parameter of our model lies. ValueError where the table has no place for it."""
        prefix, table, own = "", self.outside, name
        if name.startswith("blocks."):
            _, layer, own = name.split(".", 2)
            if int(layer) >= c.num_double_layers:
                prefix, table = self.single_layer.format(int(layer) - c.num_double_layers) + ".", self.single
            else:
                number, kind = divmod(int(layer), len(self.layers))
                prefix, table = self.layers[kind].format(number) + ".", self.block
        inner = [part for part in own.split(".") if part.isdigit()]
        own = ".".join("*" if part.isdigit() else part for part in own.split("."))
        module, _, last = own.rpartition(".")
        if own in table:
            return Place(tuple(prefix + theirs.format(*inner) for theirs in table[own].names), table[own].form)
        if module in table:
            names = tuple(f"{prefix}{theirs.format(*inner)}.{last}" for theirs in table[module].names)
            return Place(names, table[module].form)
        raise ValueError(f"parameter {name} has no place in {self.cls}; the family {self.name} cannot be written")

    def places(self, names: Iterable[str], c: Model) -> dict[str, Place]:
        return {name: self.place(name, c) for name in names}

    def differences(self, c: Model) -> Iterator[str]:
        """What keeps a model from being of this family, one line each."""
        wanted = Model(**self.fields)
        for name in dict.fromkeys((*self.fields, *EXTRAS)):
            if name not in self.free and getattr(c, name) != getattr(wanted, name):
                yield f"model.{name}={getattr(c, name)} where {self.name} has {getattr(wanted, name)}"

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Of their config.json. ValueError with everything in it that no model here has."""
        odd = [
            f"{key}={config[key]!r} where only {wanted!r} is known"
            for key, wanted in self.fixed.items()
            if key in config and _plain(config[key]) != wanted
        ]
        if odd:
            raise ValueError(f"this {self.cls} cannot be expressed here: {'; '.join(odd)}")
        try:
            return self.read(config)
        except KeyError as error:
            raise ValueError(f"config.json of this {self.cls} lacks {error}; take the whole file") from error


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
