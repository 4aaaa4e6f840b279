"""Weights and geometry to and from the transformer classes of the library diffusers: one table of names a family."""

from vidit.export.diffusers.convert import from_diffusers, to_diffusers

__all__ = ["from_diffusers", "to_diffusers"]
