"""Every section of a run, as frozen pydantic models.

A config is a value: `configs/*.py` build one, the command line overrides single fields
(`train.steps=100`, `vidit/overrides.py`), the run directory keeps it as `config.json`. Each section says what
is wrong with it alone (`faults`); `vidit/resolve.py` checks the sections together and computes what follows
from them. No torch, so that a login node can check a run in milliseconds: what the rest of the project also
needs to know of a rule (`LEGAL_TARGETS`) stands here, as data.
"""

from vidit.config.data import Bucket, Data, Source
from vidit.config.diffusion import (
    LEGAL_DENSITIES,
    LEGAL_TARGETS,
    Density,
    Diffusion,
    ForwardProcess,
    Given,
    GivenKind,
    Target,
)
from vidit.config.model import AnyWindow, Model, Skip, Window, whole_window
from vidit.config.parallel import Launch, Parallel
from vidit.config.presets import DIT, FAMILIES, PRESETS
from vidit.config.run import RunConfig
from vidit.config.sample import Sample, Sampler
from vidit.config.section import ConfigError, Section, refuse
from vidit.config.text import RESERVED_TEXT_ROWS, SecondText, Text
from vidit.config.train import Train
from vidit.config.unet import UNET_FAMILIES, UNET_PRESETS, Unet
from vidit.config.vae import VAE_PRESETS, Vae
from vidit.config.vae_train import VaeTrain

__all__ = [
    "DIT",
    "FAMILIES",
    "LEGAL_DENSITIES",
    "LEGAL_TARGETS",
    "PRESETS",
    "RESERVED_TEXT_ROWS",
    "UNET_FAMILIES",
    "UNET_PRESETS",
    "VAE_PRESETS",
    "AnyWindow",
    "Bucket",
    "ConfigError",
    "Data",
    "Density",
    "Diffusion",
    "ForwardProcess",
    "Given",
    "GivenKind",
    "Launch",
    "Model",
    "Parallel",
    "RunConfig",
    "Sample",
    "Sampler",
    "SecondText",
    "Section",
    "Skip",
    "Source",
    "Target",
    "Text",
    "Train",
    "Unet",
    "Vae",
    "VaeTrain",
    "Window",
    "refuse",
    "whole_window",
]
