"""The step functions: the loss of a row follows from its number alone, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vidit import keys
from vidit.config import RunConfig
from vidit.data.catalog import Catalog
from vidit.data.loader import MicroBatches
from vidit.data.shards import read_index
from vidit.model.windows import Grid
from vidit.sample.draw import draw
from vidit.text.encoder import TextEncoder, TextFeatures, TextTokens, build_text_encoder
from vidit.train.ema import Ema
from vidit.train.encode_clips import ClipEncoder
from vidit.train.encode_set import encode_set
from vidit.train.parallelize import build_dit, build_vae
from vidit.train.step import DitStep, to_pixels
from vidit.train.vae_step import VaeStep
from vidit.train.validation import validate
from vidit.vae.store import load_vae
from vidit.vae.stored import adopt_vae

Configure = Callable[..., RunConfig]


def go_on() -> None:
    """The check of work that nobody stops."""


CPU, FP32 = torch.device("cpu"), torch.float32


class Rig:
    """A tiny run without its loop: `batch(i)` and `step(batch)`, with every parameter off its initial value."""

    def __init__(self, config: RunConfig, text: TextEncoder | None = None, store: bool = False):
        self.config = config = adopt_vae(config)
        refs = read_index(config.data.train)
        if config.train.task == "vae":
            self.model, self.step, tokenizer = build_vae(config, CPU, FP32), VaeStep(config, CPU), None
        else:
            vae = load_vae(Path(config.vae.weights), CPU, FP32)
            self.text = text = text or build_text_encoder(config.text)
            self.model, tokenizer = build_dit(config, text, CPU, FP32), text.tokenizer
            self.step = DitStep(config, vae, text, CPU)
            if store:
                folder = config.directory / "latents"
                encode_set(
                    config, Catalog.plain(refs), folder, ClipEncoder(vae, config.vae, None, CPU, "fp32"), print, go_on
                )
                refs = read_index(folder)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # gates and output start at zero, which would hide the network from the loss
            for p in self.model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        self.batch = MicroBatches(config, Catalog.plain(refs), tokenizer, self.step.images_per_row).__getitem__

    def run(self, numbers: range) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(loss of each row, its quantile, gradients of the mean), over some micro-batches."""
        rows, quantiles = [], []
        for number in numbers:
            result = self.step(self.model, self.batch(number), "train")
            (result.rows_B.mean() / len(numbers)).backward()
            rows.append(result.rows_B.detach())
            quantiles.append(result.quantile_B)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(rows), torch.cat(quantiles), gradients


def assert_close(one: list[Tensor], other: list[Tensor]) -> None:
    floor = 1e-6 * max(float(g.norm()) for g in one)
    for a, b in zip(one, other, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(a.norm()) + floor


@pytest.mark.parametrize("self_conditioning", [0.0, 0.5])
def test_losses_do_not_depend_on_the_micro_batch(configure: Configure, self_conditioning: float) -> None:
    """Global step 1 of 8 rows, as one micro-batch of 8, as four of 2: losses, strata and gradients."""
    change = {"model": {"self_conditioning": self_conditioning}, "data": {"caption_dropout": 0.3}}
    whole = Rig(configure(**change, train={"global_batch": 8, "micro_batch": 8})).run(range(1, 2))
    parts = Rig(configure(**change, train={"global_batch": 8, "micro_batch": 2})).run(range(4, 8))
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(parts[1], whole[1])
    assert_close(whole[2], parts[2])
    assert sum(bool(g.any()) for g in whole[2]) > 0.9 * len(whole[2])


def test_cached_latents_give_the_same_losses(configure: Configure, tmp_path: Path) -> None:
    """Clips and image rows: the first latent frame of a clip is its first frame as an image."""
    data = {"image_rows": 1, "random_crop": False}
    config = configure(tmp_path, data=data, train={"micro_batch": 3, "global_batch": 3})
    direct, cached = Rig(config), Rig(config, store=True)
    assert cached.batch(1).clips.pixels is None
    one, other = direct.run(range(1, 3)), cached.run(range(1, 3))
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert_close(one[2], other[2])


def test_image_rows_hold_independent_images(configure: Configure) -> None:
    """A row of images has one noise, time and loss like a clip; its images do not see each other."""
    config = configure(data={"image_rows": 1}, train={"micro_batch": 3, "global_batch": 3})
    rig = Rig(config)
    batch = rig.batch(0)
    assert batch.images is not None
    assert (len(batch.clips.keys), len(batch.images.keys), batch.rows) == (2, 3, [0, 1, 2])
    assert batch.images.pixels.shape == (3, 1, 32, 32, 3)
    latents = rig.step.latents(batch)
    assert latents.shape == (3, 4, 3, 8, 8)
    one = rig.step.vae.encode(to_pixels(batch.images.pixels[1:2], CPU)).mean
    torch.testing.assert_close(latents[2, :, 1], rig.step.vae.whiten(one)[0, :, 0], rtol=1e-4, atol=1e-5)
    before = rig.step(rig.model, batch, "train").rows_B.detach()
    batch.images.pixels[0] = 255 - batch.images.pixels[0]
    after = rig.step(rig.model, batch, "train").rows_B.detach()
    torch.testing.assert_close(before[:2], after[:2], rtol=1e-5, atol=1e-6)
    assert abs(float(before[2] - after[2])) > 1e-6


def test_an_image_does_not_reach_its_neighbours_output(configure: Configure) -> None:
    """The network's output for image 1 and 2 of a row, when the latent and the caption of image 0 change."""
    config = configure(
        data={"image_rows": 1}, model={"pooled_text": False}, train={"micro_batch": 2, "global_batch": 2}
    )
    rig = Rig(config)
    batch = rig.batch(0)
    text = rig.step.text(rig.model, batch.tokens, 1)
    x = rig.step.latents(batch)
    grid = rig.step.grid(batch)
    out = rig.step.denoise(rig.model, x, torch.full((2,), 0.5), text, grid, None)
    x[1, :, 0] += 1
    batch.tokens.ids[1] = batch.tokens.ids[0]
    batch.tokens.mask_BL[1] = batch.tokens.mask_BL[0]
    changed = rig.step.denoise(
        rig.model, x, torch.full((2,), 0.5), rig.step.text(rig.model, batch.tokens, 1), grid, None
    )
    torch.testing.assert_close(changed[1, :, 1:], out[1, :, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changed[0], out[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed[1, :, 0], out[1, :, 0], atol=1e-3)


def test_each_row_is_told_its_frame_rate(configure: Configure, tmp_path: Path) -> None:
    """A clip its own rate or the one it is resampled to, latents that of the clip they were made of; images 0."""
    change = {"model": {"frame_rate": True}, "train": {"micro_batch": 3, "global_batch": 3}}
    own = configure(tmp_path, data={"image_rows": 1}, **change)
    resampled = configure(data={"image_rows": 1, "fps": 16.0}, **change)
    rigs = {"own": Rig(own), "stored": Rig(own, store=True), "resampled": Rig(resampled)}
    told = {name: rig.step.grid(rig.batch(0)).fps_B for name, rig in rigs.items()}
    assert {name: fps_B.tolist() for name, fps_B in told.items() if fps_B is not None} == {
        "own": [8.0, 8.0, 0.0], "stored": [8.0, 8.0, 0.0], "resampled": [16.0, 16.0, 0.0],
    }  # fmt: skip
    rig = rigs["own"]
    batch = rig.batch(0)
    before = rig.step(rig.model, batch, "train").rows_B.detach()
    batch.clips.fps = (30.0, 8.0)
    moved = (rig.step(rig.model, batch, "train").rows_B.detach() - before).abs()
    assert moved[0] > 1e-4
    assert moved[1:].max() < 1e-6
    plain = Rig(configure())
    assert plain.step.grid(plain.batch(0)).fps_B is None
    images = Rig(configure(data={"num_frames": 1}, model={"frame_rate": True}))
    told_B = images.step.grid(images.batch(0)).fps_B
    assert told_B is not None
    assert told_B.tolist() == [0.0, 0.0]


def test_a_video_is_drawn_for_its_frame_rate(configure: Configure) -> None:
    def drawn(fps: float) -> Tensor:
        rig = Rig(configure(model={"frame_rate": True}, data={"fps": fps}))
        (video,) = draw(rig.config, rig.step, rig.model, rig.text, ["a red circle moves left"], seed=1)
        return video.float()

    assert torch.equal(drawn(0.0), drawn(8.0))  # which is what its file is written with
    assert (drawn(8.0) - drawn(24.0)).abs().max() > 2


def test_self_conditioning_is_keyed_by_row(configure: Configure) -> None:
    change = {"model": {"self_conditioning": 0.5}}
    whole = Rig(configure(**change, train={"global_batch": 16, "micro_batch": 16}))
    parts = Rig(configure(**change, train={"global_batch": 16, "micro_batch": 2}))

    def chosen(rig: Rig, number: int) -> list[bool]:
        batch = rig.batch(number)
        inputs = rig.step.inputs(batch, "train")
        text = rig.step.text(rig.model, batch.tokens, len(batch.rows))
        estimate = rig.step.self_condition(rig.model, inputs, rig.step.video(batch, inputs), text)
        assert estimate is not None
        assert not estimate.requires_grad
        return [bool(row.any()) for row in estimate]

    picked = chosen(whole, 0)
    assert 2 < sum(picked) < 14
    assert [one for i in range(8) for one in chosen(parts, i)] == picked
    assert chosen(whole, 1) != picked


GIVEN = {"given": ({"kind": "random", "share": 0.8},)}


def test_given_frames_are_clean_and_at_time_zero(configure: Configure) -> None:
    """Of some clips some latent frames: what the network sees there is the clip itself, and their noise never acts."""
    rig = Rig(configure(model={"frame_times": True, "self_conditioning": 0.5}, diffusion=GIVEN))
    found = 0
    for number in range(4):
        batch = rig.batch(number)
        inputs = rig.step.inputs(batch, "train")
        video, given = rig.step.video(batch, inputs), inputs.given_BT
        assert given is not None
        frames = given[:, None, :, None, None].expand_as(video.x_t)
        assert torch.equal(video.x_t[frames], video.x_BCTHW[frames])
        assert bool(((video.x_t != video.x_BCTHW) | frames).flatten(1).float().mean(1).gt(0.99).all())
        assert torch.equal(inputs.times, torch.where(given, 0.0, inputs.t_B[:, None]))
        estimate = rig.step.estimate(torch.randn_like(video.x_t), inputs, video)
        assert inputs.chosen_B is not None
        kept = frames & inputs.chosen_B[:, None, None, None, None]
        assert torch.equal(estimate[kept], video.x_BCTHW[kept])
        assert not bool(given.all(1).any())
        found += int(given.sum())
        assert rig.step.inputs(batch, "validation").given_BT is None
    assert found > 4


def test_given_frames_beside_the_noise(configure: Configure) -> None:
    """Channels show them: all frames are noisy and count, at the time of the row."""
    rig = Rig(configure(model={"given_channels": True, "self_conditioning": 1.0}, diffusion=GIVEN))
    plain = Rig(configure())
    grids: list[Grid] = []
    rig.model["dit"].register_forward_pre_hook(lambda _, args: grids.append(args[1]))
    for number in range(3):
        batch, grids[:] = rig.batch(number), []
        inputs = rig.step.inputs(batch, "train")
        video, given = rig.step.video(batch, inputs), inputs.given_BT
        assert given is not None
        assert torch.equal(inputs.times, inputs.t_B)
        assert torch.equal(video.x_t, plain.step.video(batch, plain.step.inputs(batch, "train")).x_t)
        rig.step(rig.model, batch, "train")
        assert len(grids) == 2, "the first pass of self-conditioning too"
        for grid in grids:
            shown = grid.given_BCTHW
            assert shown is not None
            frames = given[:, None, :, None, None].expand_as(video.x_t)
            assert torch.equal(shown[:, :-1], torch.where(frames, video.x_BCTHW, 0.0))
            assert torch.equal(shown[:, -1:], frames[:, :1].float())
        rig.step(rig.model, batch, "validation")
        assert grids[-1].given_BCTHW is None
    losses = [rig.run(range(4))]
    with torch.no_grad():
        rig.model["dit"].embed.patch.given.weight.normal_()  # type: ignore[operator, union-attr]
    assert not torch.equal(losses[0][0], rig.run(range(4))[0])


def test_given_frames_belong_to_the_row(configure: Configure) -> None:
    def losses(size: int) -> list[Tensor]:
        c = configure(model={"frame_times": True}, diffusion=GIVEN, train={"micro_batch": size})
        rows, _, gradients = Rig(c).run(range(c.train.global_batch // size))
        return [rows, *gradients]

    assert_close(losses(4), losses(1))


def test_rows_of_images_are_given_nothing(configure: Configure) -> None:
    c = configure(model={"frame_times": True}, diffusion=GIVEN, data={"image_rows": 2}, train={"micro_batch": 4})
    rig = Rig(c)
    given = [rig.step.inputs(rig.batch(n), "train").given_BT for n in range(2)]
    assert all(g is not None and g.shape[0] == 4 and not g[2:].any() for g in given)
    assert any(g is not None and bool(g[:2].any()) for g in given)


def test_a_share_of_clips_is_without_motion(configure: Configure) -> None:
    """Keyed by their rows, in training alone; the first pass of self-conditioning sees them so too."""
    still = {"temporal_attention": True, "relative_position": "rope", "motion_free": 0.5, "self_conditioning": 1.0}
    rig = Rig(configure(model=still))
    batch = rig.batch(0)
    marks = rig.step.inputs(batch, "train").grid.still_B
    assert marks is not None
    assert torch.equal(marks, keys.uniform(rig.config.train.seed, "motion_free", batch.rows) < 0.5)
    assert rig.step.inputs(batch, "validation").grid.still_B is None
    grids: list[Grid] = []
    hook = rig.model["dit"].register_forward_pre_hook(lambda _, args: grids.append(args[1]))
    rig.step(rig.model, batch, "train")
    hook.remove()
    assert len(grids) == 2
    assert all(grid.still_B is not None and torch.equal(grid.still_B, marks) for grid in grids)
    assert (
        sum(int(m.sum()) for n in range(4) if (m := rig.step.inputs(rig.batch(n), "train").grid.still_B) is not None)
        > 0
    )


def test_strata_cover_every_slot_of_every_step(configure: Configure) -> None:
    rig = Rig(configure(train={"global_batch": 8, "micro_batch": 2}))
    orders = []
    for step in range(3):
        q = rig.step.quantiles(list(range(8 * step, 8 * step + 8)), "train", 8)
        slots = (q * 8).long().tolist()
        assert sorted(slots) == list(range(8))
        orders.append(slots)
    assert orders[0] != orders[1], "dealt anew each step"
    free = Rig(configure(diffusion={"stratified": False}, train={"global_batch": 8, "micro_batch": 2}))
    q = free.step.quantiles(list(range(80)), "train", 8)
    assert sorted((q[:8] * 8).long().tolist()) != list(range(8))
    fixed = free.step.quantiles(list(range(4)), "validation", 4)
    assert sorted((fixed * 4).long().tolist()) == [0, 1, 2, 3], "validation is always stratified"


def test_validation_is_fixed_and_leaves_the_model_alone(configure: Configure) -> None:
    rig = Rig(configure(model={"self_conditioning": 0.5}))
    ema = Ema(rig.model, 0.9)
    batches = [rig.batch(i) for i in range(2)]

    def values() -> dict[str, float]:
        with ema.applied(rig.model):
            return validate(rig.model, rig.step, batches, 2, go_on)

    rig.step(rig.model, rig.batch(5), "train")
    before = {name: p.clone() for name, p in rig.model.named_parameters()}
    first = values()
    assert all(torch.equal(p, before[name]) for name, p in rig.model.named_parameters())
    assert rig.model.training
    assert values() == first
    assert set(first) == {"loss", "loss_band_0", "loss_band_1"}
    assert first["loss"] == pytest.approx((first["loss_band_0"] + first["loss_band_1"]) / 2, rel=1e-6)
    with torch.no_grad():  # the averages count, not the weights
        for p in rig.model.parameters():
            p.zero_()
    assert values() == first
    ema.averages["dit.head.project.weight"].mul_(2)
    assert values() != first


class FrozenText(TextEncoder):
    """Stands in for a pretrained encoder: features from a fixed table, one row a character of the caption."""

    trainable = False

    def __init__(self) -> None:
        super().__init__()
        self.width, self.max_tokens, self.tokenizer = 16, 6, tokenize
        self.table = nn.Parameter(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), requires_grad=False)

    def forward(self, tokens: TextTokens) -> TextFeatures:
        features = self.table[tokens.ids] * tokens.mask_BL.unsqueeze(-1)
        return TextFeatures(features, tokens.mask_BL, features.mean(1))


def tokenize(captions: list[str]) -> TextTokens:
    ids = torch.tensor([[ord(c) % 64 for c in f"\0{text}"[:6].ljust(6)] for text in captions])
    mask = torch.tensor([[i <= len(text) for i in range(6)] for text in captions])
    return TextTokens(ids, mask)


def test_a_frozen_text_encoder_is_used_and_not_trained(configure: Configure) -> None:
    text = FrozenText()
    rig = Rig(configure(data={"image_rows": 1}), text)
    assert set(rig.model) == {"dit"}, "a frozen encoder is no part of the trained model"
    rows, _, gradients = rig.run(range(1))
    assert torch.isfinite(rows).all()
    assert any(bool(g.any()) for g in gradients)
    text.table.data.mul_(-3)
    assert not torch.equal(rig.run(range(1))[0], rows)
    assert text.table.grad is None


@pytest.mark.parametrize("image_rows", [0, 1])
def test_vae_step(configure: Configure, image_rows: int) -> None:
    """L1 + L2 + KL as written out, the same however the batch is cut."""
    config = configure(
        data={"image_rows": image_rows},
        vae={"l1_weight": 0.7, "l2_weight": 0.3, "kl_weight": 1e-3},
        train={"task": "vae", "global_batch": 4, "micro_batch": 4},
    )
    rig = Rig(config)
    rows, quantiles, gradients = rig.run(range(1, 2))
    assert rows.shape == (4,)
    assert not quantiles.any()
    assert all(bool(g.isfinite().all()) for g in gradients)
    result = rig.step(rig.model, rig.batch(1), "train")
    assert set(result.parts) == {"l1", "kl", "psnr"}
    if not image_rows:
        x = to_pixels(rig.batch(1).clips.pixels, CPU)
        q = rig.model["vae"].encode(x)
        expected = 0.5 * (q.mean**2 + q.log_variance.exp() - 1 - q.log_variance).mean()
        assert result.parts["kl"] == pytest.approx(float(expected.detach()), rel=1e-5)
        cut = Rig(config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})}))
        other = cut.run(range(4, 8))
        torch.testing.assert_close(other[0], rows, rtol=1e-4, atol=1e-5)
        assert_close(gradients, other[2])


def test_a_step_sees_captions_only_through_their_tokens(configure: Configure) -> None:
    """The caption reaches the loss, and an emptied caption is the unconditional one."""
    rig = Rig(configure())
    batch = rig.batch(0)
    with_text = rig.step(rig.model, batch, "train").rows_B
    batch.tokens = TextTokens(batch.tokens.ids.clone(), batch.tokens.mask_BL.clone())
    batch.tokens.ids[:, 1:] = 0
    batch.tokens.mask_BL[:, 1:] = False
    without = rig.step(rig.model, batch, "train").rows_B
    assert not torch.allclose(with_text, without)
    dropped = MicroBatches(
        rig.config.model_copy(update={"data": rig.config.data.model_copy(update={"caption_dropout": 0.999})}),
        Catalog.plain(read_index(rig.config.data.train)), build_text_encoder(rig.config.text).tokenizer, 3,
    )[0]  # fmt: skip
    assert torch.equal(dropped.tokens.ids, batch.tokens.ids)
