"""What a family of models is called in diffusers: its class, its geometry, its names.

A table says everything about names (`outside`, `block`); what is not in it is an error, in either direction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from vidit.config import Model
from vidit.export.diffusers.forms import SAME, Form


class Geometry(NamedTuple):
    """What a denoiser is built from: its config, latent channels, width of the text features.

    `latent` (T, H, W) and `text_tokens` are the sizes that it is used at, which no weight depends on; their classes
    keep them, ours do not. `said` is what whoever reads the model has to be told.
    """

    model: Model
    channels: int
    text_width: int
    latent: tuple[int, int, int] | None = None
    text_tokens: int | None = None
    said: str = ""


class Place(NamedTuple):
    """Where a parameter, or all parameters of a module, lie in their model."""

    names: tuple[str, ...]
    form: Form = SAME


def at(*names: str, form: Form = SAME) -> Place:
    return Place(names, form)


# What only some families have: elsewhere it has to be at its default.
EXTRAS = (
    "pooled_text", "pooled_embedding", "pooled_width", "guidance", "num_refiner_layers", "num_single_layers",
    "text_weights", "rope_theta", "frame_rate", "time_spacing", "mlp_norm_eps", "cross_text", "text_embedding",
)  # fmt: skip


def require_same_channels(config: Mapping[str, Any]) -> None:
    """ValueError for a model of theirs that is given more than the noisy latent, such as an image."""
    if config["out_channels"] not in (None, config["in_channels"]):
        raise ValueError(
            f"{config['in_channels']} channels in and {config['out_channels']} out: only text-to-video models, whose "
            "input is the noisy latent alone, can be read"
        )


def require_numbers(config: Mapping[str, Any], counts: Iterable[str], reals: Iterable[str], cls: str) -> None:
    """ValueError for entries that are no positive whole numbers, or no positive numbers. KeyError for missing ones."""
    for names, kinds, what in ((counts, (int,), "a whole number"), (reals, (int, float), "a number")):
        for name in names:
            if type(config[name]) not in kinds or not config[name] > 0:
                raise ValueError(
                    f"config.json of this {cls} has {name}={config[name]!r}, and it is {what} above 0; take the whole "
                    "file"
                )


def _agree(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Of most classes nothing more than what shapes of ours tell."""


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
        ours and {} in theirs. What every block has stands outside with {layer}, and is a name for each of them.
    single_layer, single: the same of single-stream blocks.
    free: extras that members choose.
    older: names of the class in older files.
    known: of their config.json, what older files say beside `fixed`; not written.
    computed: names in older files of what the class computes.
    cures: what to do about a field that differs.
    agree: their config.json and shapes; ValueError where they contradict each other, besides what ours tell.
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
    older: tuple[str, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)
    computed: tuple[str, ...] = ()
    cures: Mapping[str, str] = field(default_factory=dict)
    agree: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], None] = _agree

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
            names = [prefix + theirs.format(*inner) for theirs in _each(table[own].names, c)]
            return Place(tuple(names), table[own].form)
        if module in table:
            names = [f"{prefix}{theirs.format(*inner)}.{last}" for theirs in _each(table[module].names, c)]
            return Place(tuple(names), table[module].form)
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
            for key, wanted in (*self.fixed.items(), *self.known.items())
            if key in config and _plain(config[key]) != wanted
        ]
        if odd:
            raise ValueError(f"this {self.cls} cannot be expressed here: {'; '.join(odd)}")
        try:
            return self.read(config)
        except KeyError as error:
            raise ValueError(f"config.json of this {self.cls} lacks {error}; take the whole file") from error
        except ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise ValueError(f"config.json of this {self.cls} gives no model ({found}); take the whole file") from error


def _each(names: Iterable[str], c: Model) -> Iterator[str]:
    """Of what every block has a name for each, in order."""
    for name in names:
        layers = range(c.num_layers if "{layer}" in name else 1)
        yield from (name.replace("{layer}", str(layer)) for layer in layers)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
