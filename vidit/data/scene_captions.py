"""Writes the caption of a scene: true, complete and in varied English.

Contract: every thing is named as "<colour> <shape>" and its motion is told; which words are used depends on
`scene.seed` only. The background is mentioned in some captions and never wrongly.
"""

import numpy as np

from vidit.data.scene_types import Scene, Thing, keyed_generator

_SINGLE = (
    "A {name} {does}{where}.",
    "A {name} is {doing}{where}.",
    "A {name} {doing}{where}.",
    "There is a {name} {doing}{where}.",
    "A video of a {name} that {does}{where}.",
    "This clip shows a {name} {doing}{where}.",
    "We see a {name} that {does}{where}.",
    "{Opening}, a {name} {does}.",
)
_SEVERAL = (
    "{Clauses}{where}.",
    "In this video, {clauses}{where}.",
    "{Opening}, {clauses}.",
    "We see how {clauses}{where}.",
)
_GO = (("moves", "moving"), ("slides", "sliding"), ("drifts", "drifting"), ("glides", "gliding"))
_WAYS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}
_CHANGES = {
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("contracts", "contracting")),
    "turn": (("spins", "spinning"), ("turns in place", "turning in place"), ("rotates", "rotating")),
}
_COLLISIONS = (
    "a {a} and a {b} bump into each other and bounce apart",
    "a {a} bumps into a {b} and they bounce apart",
    "a {a} and a {b} collide and bounce apart",
    "a {a} collides with a {b} and both bounce back",
)
_PLACES = ("over", "on", "in front of")


def caption(scene: Scene) -> str:
    """One sentence that names colour, shape and motion of every thing."""
    rng = keyed_generator("caption", scene.seed)
    place = f"{_pick(rng, _PLACES)} a {scene.background.texture} background" if rng.random() < 0.4 else ""
    words = {"where": f" {place}" if place else "", "Opening": _capital(place or "in this video")}
    if len(scene.things) == 1:
        does, doing = _verb(rng, scene.things[0])
        return _pick(rng, _SINGLE).format(name=_name(scene.things[0]), does=does, doing=doing, **words)
    clauses = _join(rng, _clauses(rng, scene.things))
    return _pick(rng, _SEVERAL).format(clauses=clauses, Clauses=_capital(clauses), **words)


def _clauses(rng: np.random.Generator, things: tuple[Thing, ...]) -> list[str]:
    pair = [thing for thing in things if thing.motion == "collide"]
    clauses = []
    if pair:
        clauses.append(_pick(rng, _COLLISIONS).format(a=_name(pair[0]), b=_name(pair[1])))
    clauses += [f"a {_name(thing)} {_verb(rng, thing)[0]}" for thing in things if thing.motion != "collide"]
    return [clauses[i] for i in rng.permutation(len(clauses))]


def _join(rng: np.random.Generator, clauses: list[str]) -> str:
    if len(clauses) == 1:
        return clauses[0]
    if len(clauses) == 2:
        return _pick(rng, (" while ", " and ", ", while ")).join(clauses)
    head, middle, last = clauses
    return _pick(rng, (f"{head}, {middle} and {last}", f"{head} while {middle} and {last}"))


def _verb(rng: np.random.Generator, thing: Thing) -> tuple[str, str]:
    """(third person, gerund) of what one thing does on its own."""
    if thing.motion in _CHANGES:
        does, doing = _CHANGES[thing.motion][int(rng.integers(len(_CHANGES[thing.motion])))]
        return does, doing
    does, doing = _GO[int(rng.integers(len(_GO)))]
    way = _pick(rng, _WAYS[thing.motion])
    return f"{does} {way}", f"{doing} {way}"


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
