"""A whole run: its sections together."""

from pathlib import Path

from pydantic import Field

from vidit.config.data import Data
from vidit.config.diffusion import Diffusion
from vidit.config.model import Model
from vidit.config.parallel import Launch, Parallel
from vidit.config.sample import Sample
from vidit.config.section import Section
from vidit.config.text import Text
from vidit.config.train import Train
from vidit.config.unet import Unet
from vidit.config.vae import Vae
from vidit.config.vae_train import VaeTrain


class RunConfig(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str = Field("", description="where the run writes; empty = runs/<name>")
    text: Text = Text()
    vae: Vae = Vae()
    vae_train: VaeTrain = VaeTrain()
    model: Model = Model()
    unet: Unet = Unet()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    train: Train = Train()
    parallel: Parallel = Parallel()
    launch: Launch = Launch()
    sample: Sample = Sample()

    @property
    def denoiser(self) -> Model | Unet:
        """What is trained on latents: the DiT, or with `train.task=unet` the U-Net."""
        return self.unet if self.train.task == "unet" else self.model

    @property
    def directory(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)
