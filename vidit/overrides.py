"""`section.key=value` on the command line: parsed, applied, and every fault of it named in one message."""

import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from vidit.config import ConfigError, RunConfig, Section


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Apply `section.key=value` strings; raises ConfigError naming every unknown key and bad value."""
    # Only what was set: whether a field was given or is a default matters where a VAE's folder decides it.
    tree, faults = config.model_dump(exclude_unset=True), []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            faults.append(f"override {text!r} has no '='; write section.key=value")
            continue
        try:
            _set(tree, RunConfig, key, value)
        except ValueError as error:
            faults.append(str(error))
    try:
        result = RunConfig.model_validate(tree)
    except ValidationError as error:
        faults += faults_of(error)
    if faults:
        raise ConfigError(faults)
    return result


def faults_of(error: ValidationError) -> list[str]:
    """What pydantic found, one line a fault, in the words of this module."""
    section = "" if error.title == "RunConfig" else f"{error.title.lower()}."
    faults = []
    for fault in error.errors():
        key = section + ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            faults.append(_unknown(key))
        elif fault["type"] != "too_short" or not faults:  # a list is too short where an entry of it was faulty
            cure = _CURES.get(fault["type"], "")
            faults.append(f"{key}={fault['input']!r}: {fault['msg']}{cure and f'; {cure}'}")
    return faults


_CURES = {
    "tuple_type": "write a JSON list, such as [1,2]",
    "missing": "the list holds fewer entries than the field has",
    "string_pattern_mismatch": "use letters, digits, '.', '_' and '-'",
}


def _set(tree: dict[str, Any], model: type[Section], key: str, value: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            raise ValueError(_unknown(key))
        tree, model = tree.setdefault(section, {}), field.annotation
    if name not in model.model_fields:
        raise ValueError(_unknown(key))
    annotation = model.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        raise ValueError(f"{key} is a section; set one of its fields: {' '.join(annotation.model_fields)}")
    tree[name] = _parse(value, annotation)


def _parse(value: str, annotation: Any) -> Any:
    """A value as JSON where that gives something the field may hold, else as the text itself."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value in ("none", "null") and type(None) in options:
        return None
    if str in options:
        return value
    literals = [one for o in options if typing.get_origin(o) is Literal for one in typing.get_args(o)]
    if literals:
        return next((one for one in literals if str(one) == value), value)
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def field_names(model: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every legal dotted key."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from field_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def flat(config: RunConfig) -> dict[str, Any]:
    """Every field under its dotted key."""
    values: dict[str, Any] = {}
    for name in field_names():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    return values


def _unknown(key: str) -> str:
    names = list(field_names())
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, names, 3, 0.5)
    near += [
        n for n in names if n.rpartition(".")[2] in difflib.get_close_matches(last, [n.rpartition(".")[2]], 1, 0.75)
    ]
    return f"unknown key {key!r}; nearest: {', '.join(dict.fromkeys(near)) or 'none; see `vidit config CONFIG`'}"
