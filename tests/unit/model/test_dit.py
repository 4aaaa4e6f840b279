"""The denoiser as a whole: sizes, arithmetic, independence of rows and images, initial values, precision."""

import itertools
import re
from dataclasses import replace
from operator import mul

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidit import keys
from vidit.config import FAMILIES, PRESETS, Model
from vidit.model.context import EVERY_FRAME, PADDING
from vidit.model.dit import DiT, text_frames
from vidit.model.embed import Head, PatchEmbed
from vidit.model.flops import forward_flops, parameter_count, training_flops
from vidit.model.init import initial_value, initialise
from vidit.model.windows import Grid

GRID = (3, 4, 6)
CHANNELS, TEXT = 3, 10
TINY = {
    "num_layers": 4,
    "width": 32,
    "num_heads": 2,
    "mlp_width": 48,
    "windows": ((1, 0, 0), (0, 2, 4)),
    "attention_backend": "sdpa",
}
JOINT = {"cross_attention": "joint", "windows": ((0, 0, 0),), "relative_position": "rope", "image_attention": "frame"}
JOINT_2B = {**FAMILIES["cogvideox"], "relative_position": "none", "absolute_position": "sincos"}
# In which an image of a row is a clip of one frame.
CLIPS = ("wan", "latte", "stdit3", "gentron")
STREAMS_2B = {**FAMILIES["hunyuanvideo"], "relative_position": "none", "pooled_text": False}
VARIATIONS = {
    "default": {},
    "rope": {"relative_position": "rope"},
    "bare": {"relative_position": "none", "absolute_position": False, "qk_norm": False, "self_conditioning": 0.0},
    "none": {"cross_attention": "none"},
    "all": {"cross_attention": "all"},
    "text keys": {"cross_attention": "all", "cross_keys": "text"},
    "pooled": {"pooled_text": True},
    "frame rate": {"frame_rate": True},
    "rank 0": {"adaln_rank": 0},
    "rank 5": {"adaln_rank": 5},
    "patch": {"patch": 2},
    "patch of frames": {"patch": (2, 1, 3)},
    "full": {"windows": ((0, 0, 0),), "cross_attention": "all"},
    "four windows": {"windows": ((1, 0, 0), (0, 1, 1), (2, 2, 2), (0, 0, 0)), "num_layers": 5},
    "table": {"modulation": "table"},
    "norms": {"qk_norm": "width", "cross_norm": "affine", "activation": "gelu_tanh"},
    "no norm before text": {"cross_norm": "none"},
    "joint": {**JOINT, "adaln_rank": 3},
    "joint table, norms": {**JOINT, "modulation": "table", "norm_affine": True, "qk_norm": "head_affine"},
    "sinusoids": {"absolute_position": "sincos", "position_scale": (1.0, 2.0, 1.5), "norm_affine": True},
    "space, then time": {"absolute_position": "space_then_time", "position_span": 7, "learned_variance": True},
    "times of frames": {"frame_times": True, "pooled_text": True, "frame_rate": True},
    "times of frames, table": {**FAMILIES["stdit3"], "frame_times": True},
    "skips": {"windows": (("single", 2), ("group", 3)), "relative_position": "rope", "cross_attention": "all"},
    "through time": {
        "temporal_attention": True,
        "relative_position": "rope",
        "qk_norm": "width",
        "norm_affine": True,
    },
    "channels of given frames": {"given_channels": True, "patch": (1, 2, 1)},
    "two streams, then one, alike": {**JOINT, "adaln_rank": 0, "num_single_layers": 2, "norm_affine": True},
    "one stream alone": {**JOINT, "adaln_rank": 0, "num_single_layers": 4, "qk_norm": "head_rms"},
    "captions refined for cross-attention": {
        "text_embedding": "linear",
        "num_refiner_layers": 2,
        "cross_attention": "all",
    },
    "guidance": {"guidance": 3.0, "pooled_text": True, "pooled_embedding": "mlp"},
    "wide norms of two streams": {**FAMILIES["flux"], "qk_norm": "width", "num_single_layers": 1},
    "text by one layer": {"text_embedding": "linear", "time_frequencies": 64, "time_width": 20, "adaln_rank": 0},
    **FAMILIES,
}


def build(grid=GRID, seed=0, filled=True, **changes):
    """A tiny DiT. `filled` replaces the zeros of AdaLN-Zero, so that every path reaches the output."""
    model = DiT(Model(**{**TINY, **changes}), CHANNELS, grid, TEXT)
    initialise(model, seed)
    if filled:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not p.any():
                    rows = keys.generator(seed, "fill", name).standard_normal(tuple(p.shape), np.float32)
                    p.copy_(0.1 * torch.from_numpy(rows))
    return model


def inputs(rows=2, grid=GRID, patch=(1, 1, 1), tokens=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    frame = torch.full((rows, tokens), EVERY_FRAME)
    frame[0, -2:] = PADDING
    return {
        "x_BCTHW": torch.randn(rows, CHANNELS, *map(mul, grid, patch), generator=g),
        "time_B": torch.rand(rows, generator=g) * 1000,
        "text_BLE": torch.randn(rows, tokens, TEXT, generator=g),
        "text_frame_BL": frame,
        "pooled_BE": torch.randn(rows, TEXT, generator=g),
    }


def denoise(model, x_BCTHW, *rest, image_B=None, fps=24.0, **more):
    """The output for a latent, on the grid that it has."""
    frames, *space = x_BCTHW.shape[2:]
    fps_B = torch.full(x_BCTHW.shape[:1], fps) if model.config.frame_rate else None
    grid = Grid(*(n // p for n, p in zip((frames, *space), model.head.patch, strict=True)), image_B, fps_B)
    if model.config.given_channels:
        grid = replace(grid, given_BCTHW=torch.cat((x_BCTHW, x_BCTHW[:, :1]), dim=1))
    return model(x_BCTHW, grid, *rest, **more)


def meta(c, *args):
    with torch.device("meta"):
        return DiT(c, *args)


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


class TestParameters:
    # W.A.L.T. (2312.06662), tables of hyperparameters. Two printed digits are compared as such: 1.3B is
    # ViT-g/14's 1408 x 40 (`[C]` 1.33B in papers.md), 3B has an unpublished width.
    @pytest.mark.parametrize(
        ("name", "changes", "grid", "text", "printed", "tolerance"),
        [
            ("L", {"cross_attention": "none"}, (5, 16, 16), 1, 313e6, 0.01),
            ("XL", {"cross_attention": "none"}, (5, 16, 16), 1, 460e6, 0.01),
            ("SR1", {}, (5, 16, 28), 2048, 1.3e9, 0.045),
            ("SR2", {}, (5, 16, 28), 2048, 419e6, 0.01),
            ("3B", {}, (5, 16, 16), 2048, 3.0e9, 0.04),
            # 2412.03603 and 2503.09642; of the second's backbone, FLUX.1's, 12B is said elsewhere.
            ("hunyuanvideo", {}, (33, 45, 80), 4096, 13e9, 0.015),
            ("opensora-2", {}, (33, 48, 48), 4096, 11e9, 0.085),
        ],
    )
    def test_paper(self, name, changes, grid, text, printed, tolerance):
        c, channels = Model.preset(name, **changes), 16 if name in ("hunyuanvideo", "opensora-2") else 8
        assert (c.self_conditioning > 0) == (channels == 8)
        assert num_parameters(meta(c, channels, grid, text)) == pytest.approx(printed, rel=tolerance)

    @pytest.mark.parametrize("name", PRESETS)
    def test_arithmetic_of_presets(self, name):
        c, grid = Model.preset(name), (5, 16, 28)
        assert num_parameters(meta(c, 8, grid, 77, 60)) == parameter_count(c, grid, 8, 77, 60)

    @pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
    @pytest.mark.parametrize("grid", [GRID, (1, 5, 3)])
    def test_arithmetic_of_options(self, changes, grid):
        c = Model(**{**TINY, **changes})
        assert num_parameters(meta(c, CHANNELS, grid, TEXT)) == parameter_count(c, grid, CHANNELS, TEXT)

    def test_meta_allocates_nothing(self):
        model = meta(Model.preset("7B"), 16, (21, 30, 52), 4096)
        assert all(p.is_meta for p in model.parameters())
        assert not list(model.buffers())

    def test_names_are_the_contract_of_checkpoints(self):
        names = set(build(num_layers=2).state_dict())
        attention = [f"{part}.{leaf}" for part in ("query", "key", "value", "out") for leaf in ("weight", "bias")]
        attention += ["query_norm.weight", "key_norm.weight"]
        both = [f"attn.{n}" for n in [*attention, "bias.table"]] + ["modulation.down.weight", "modulation.up.weight"]
        both += ["mlp.up.weight", "mlp.up.bias", "mlp.down.weight", "mlp.down.bias"]
        expected = {f"blocks.{n}.{leaf}" for n in range(2) for leaf in both}
        expected |= {f"blocks.0.cross.{leaf}" for leaf in attention}
        expected |= {"embed.position.time", "embed.position.space"}
        linear = ["embed.patch.project", "embed.conditioning.time.up", "embed.conditioning.time.out", "embed.text.up"]
        linear += ["embed.conditioning.shared", "embed.text.out", "head.modulation", "head.project"]
        expected |= {f"{name}.{leaf}" for name in linear for leaf in ("weight", "bias")}
        assert names == expected

    def test_names_do_not_depend_on_how_it_was_built(self):
        names = list(build().state_dict())
        assert list(meta(Model(**TINY), CHANNELS, GRID, TEXT).state_dict()) == names
        assert list(DiT(Model(**TINY), CHANNELS, GRID, TEXT).state_dict()) == names

    def test_a_pipeline_cut_keeps_names(self):
        """A stage is the same class with blocks removed."""
        whole, stage = build(), build()
        for layer in ("0", "1"):
            del stage.blocks[layer]
        cut = {name for name in whole.state_dict() if not re.match(r"blocks\.[01]\.", name)}
        assert set(stage.state_dict()) == cut


class TestFlops:
    @pytest.mark.parametrize(
        "changes",
        [
            {"windows": ((0, 0, 0),), "cross_attention": "none"},
            {"windows": ((1, 0, 0), (0, 4, 4)), "relative_position": "none"},
            {"windows": ((1, 0, 0), (0, 4, 4)), "cross_attention": "all", "self_conditioning": 0.0},
            {"windows": ((1, 0, 0), (0, 1, 1)), "cross_attention": "all", "cross_keys": "text", "patch": 2},
            JOINT,
            FAMILIES["wan"],
            {**FAMILIES["cogvideox"], "time_width": 0},
            {**FAMILIES["flux"], "qk_norm": "none", "pooled_text": False},
            {**FAMILIES["hunyuanvideo"], "num_single_layers": 3, "pooled_text": False},
            {**FAMILIES["latte"], "patch": (2, 2, 1), "learned_variance": True},
            {**FAMILIES["stdit3"], "frame_times": True, "learned_variance": True},
            {**FAMILIES["opensora_plan"], "num_layers": 5},
            {**FAMILIES["gentron"], "pooled_text": False},
        ],
    )
    @pytest.mark.parametrize("rows", [1, 2])
    def test_forward_is_what_the_counter_counts(self, changes, rows):
        """Counted with the math kernel: FlopCounterMode (torch 2.13) sees no FLOPs in the CPU's fused attention."""
        c = Model(**{**TINY, "width": 64, "mlp_width": 256, "qk_norm": False, "adaln_rank": 1, **changes})
        grid, text, tokens = (2, 8, 8), 24, 128
        model = DiT(c, 4, grid, text)
        initialise(model, 0)
        x = torch.randn(rows, 4, *map(mul, grid, c.patch))
        frame = torch.full((rows, tokens), EVERY_FRAME)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            denoise(model, x, torch.rand(rows), torch.randn(rows, tokens, text), frame)
        expected = rows * forward_flops(c, grid, 4, text, tokens)
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)

    def test_training(self):
        assert training_flops(100, 0.0) == 300
        assert training_flops(100, 0.9) == pytest.approx(390)


class TestInitialise:
    def test_output_is_zero_at_the_start(self):
        assert not denoise(build(filled=False), **inputs()).any()

    def test_blocks_without_text_start_as_the_identity(self):
        model = build(filled=False, cross_attention="none")
        seen = []
        for block in model.blocks.values():
            block.register_forward_hook(lambda _, args, out: seen.append(torch.equal(args[0], out)))
        denoise(model, **inputs())
        assert seen == [True] * 4

    @pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
    def test_every_parameter_is_touched(self, changes):
        model = DiT(Model(**{**TINY, **changes}), CHANNELS, GRID, TEXT)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float("nan"))
        initialise(model, 0)
        assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []

    def test_numbers_belong_to_names(self):
        """Nor do they depend on the order of construction, or on which other parameters there are."""
        model = build(filled=False)
        values = dict(model.state_dict())
        other = DiT(Model(**{**TINY, "pooled_text": True, "num_layers": 6}), CHANNELS, GRID, TEXT)
        other.blocks = torch.nn.ModuleDict(reversed(list(other.blocks.items())))
        torch.manual_seed(5)
        initialise(other, 0)
        mixed = other.state_dict()
        assert all(torch.equal(value, mixed[name]) for name, value in values.items())
        assert all(torch.equal(value, initial_value(name, tuple(value.shape), 0)) for name, value in values.items())

    def test_seeds_differ_and_layers_differ(self):
        one, two = build(filled=False), build(filled=False, seed=1)
        drawn = [n for n, p in one.named_parameters() if p.unique().numel() > 1]
        assert len(drawn) > 20
        assert all(not torch.equal(one.get_parameter(n), two.get_parameter(n)) for n in drawn)
        layers = [one.blocks[str(n)].mlp.up.weight for n in range(4)]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(layers, 2))

    def test_distributions(self):
        value = initial_value("blocks.0.mlp.up.weight", (300, 200), 0)
        bound = (6 / 500) ** 0.5
        assert value.abs().max() <= bound
        assert value.std() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert initial_value("embed.position.space", (50, 40, 8), 0).std() == pytest.approx(0.02, rel=0.02)
        conv = initial_value("encoder.first.weight", (64, 32, 3, 3, 3), 0)
        assert conv.abs().max() == pytest.approx((6 / (96 * 27)) ** 0.5, rel=0.01)
        for zero in ("head.project.weight", "head.modulation.bias", "blocks.3.modulation.up.weight"):
            assert not initial_value(zero, (4, 4), 0).any()
        for zero in ("blocks.0.attn.bias.table", "embed.conditioning.shared.weight", "blocks.1.attn.query.bias"):
            assert not initial_value(zero, (4, 4), 0).any()
        for one in ("blocks.0.attn.query_norm.weight", "blocks.0.cross.key_norm.weight", "norm.weight"):
            assert torch.equal(initial_value(one, (4,), 0), torch.ones(4))
        with pytest.raises(ValueError, match=r"no rule .* odd\.scale of shape \(4,\)"):
            initial_value("odd.scale", (4,), 0)

    def test_golden(self):
        """Pinned: a change here changes every run's first loss."""
        value = initial_value("blocks.0.attn.query.weight", (4, 4), 0)
        torch.testing.assert_close(value[0], torch.tensor(GOLDEN), rtol=0, atol=1e-7)


GOLDEN = [-0.16216836869716644, -0.7522507309913635, 0.19146351516246796, -0.5176733732223511]


class TestRows:
    @pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
    def test_a_row_does_not_depend_on_the_others(self, changes):
        model = build(**changes)
        batch = inputs(3, patch=model.head.patch)
        out = denoise(model, **batch)
        alone = denoise(model, **{name: value[1:2] for name, value in batch.items()})
        torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-5)
        other = {name: value.clone() for name, value in batch.items()}
        for value in (v for v in other.values() if v.is_floating_point()):
            value[[0, 2]] *= -3
        again = denoise(model, **other)
        torch.testing.assert_close(again[1], out[1], rtol=0, atol=1e-6)
        assert (again[0] - out[0]).abs().max() > 1e-2

    @pytest.mark.parametrize("name", ["x_BCTHW", "time_B", "text_BLE", "pooled_BE"])
    def test_every_input_matters(self, name):
        model, batch = build(pooled_text=True), inputs()
        moved = {**batch, name: batch[name] + 1}
        assert (denoise(model, **batch) - denoise(model, **moved)).abs().max() > 1e-3

    def test_the_frame_rate_matters_once_it_is_trained(self):
        """Added to a trained model it changes nothing at first: the last layer of its embedding is zero."""
        batch, slow, fast = inputs(), 8.0, 24.0
        model = build(frame_rate=True)
        assert (denoise(model, **batch, fps=slow) - denoise(model, **batch, fps=fast)).abs().max() > 1e-3
        with torch.no_grad():
            for name, p in model.embed.conditioning.frame_rate.named_parameters():
                p.copy_(initial_value(f"embed.conditioning.frame_rate.{name}", tuple(p.shape), 0))
        assert torch.equal(denoise(model, **batch, fps=slow), denoise(model, **batch, fps=fast))
        assert torch.equal(denoise(model, **batch, fps=slow), denoise(build(), **batch))

    def test_text_padding_does_not_matter(self):
        model, batch = build(cross_attention="all"), inputs()
        text = batch["text_BLE"].clone()
        text[0, -2:] = 9.0
        assert torch.equal(denoise(model, **batch), denoise(model, **{**batch, "text_BLE": text}))

    @pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
    def test_padding_is_seen_where_the_config_says_so(self, family):
        for padding in ("masked", "seen"):
            model, batch = build(**{**family, "patch": 1, "text_padding": padding}), inputs()
            text = batch["text_BLE"].clone()
            text[0, -2:] = 9.0
            moved = denoise(model, **{**batch, "text_BLE": text}) - denoise(model, **batch)
            assert bool(moved[0].any()) == (padding == "seen")
            assert not moved[1].any()

    def test_a_refiner_reads_no_padding(self):
        """Nor does what fills a caption change what its tokens become."""
        model, batch = build(**{**STREAMS_2B, "patch": 1}), inputs()
        text = batch["text_BLE"].clone()
        text[0, -2:] = 9.0
        torch.testing.assert_close(denoise(model, **{**batch, "text_BLE": text}), denoise(model, **batch))
        text[0, 0] = 9.0
        assert (denoise(model, **{**batch, "text_BLE": text}) - denoise(model, **batch))[0].abs().max() > 1e-3

    def test_guidance_is_told(self):
        one, other = (build(guidance=scale) for scale in (1.0, 6.0))
        assert one.state_dict().keys() == other.state_dict().keys()
        assert (denoise(one, **inputs()) - denoise(other, **inputs())).abs().max() > 1e-3

    def test_text_frames(self):
        assert text_frames(torch.tensor([[True, False]])).tolist() == [[EVERY_FRAME, PADDING]]

    @pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS)
    def test_gradient_reaches_every_parameter(self, changes):
        model = build(**changes)
        batch = inputs(patch=model.head.patch)
        previous = torch.randn_like(batch["x_BCTHW"]) if model.embed.patch.self_conditioned else None
        out = denoise(model, **batch, previous_BCTHW=previous)
        assert out.shape == batch["x_BCTHW"].shape
        out.square().sum().backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == []


class TestTimesOfFrames:
    """A time for each latent frame: a row of frames at their own times, and the same as one where they are equal."""

    @pytest.mark.parametrize("changes", [{}, {"adaln_rank": 0}, {**FAMILIES["stdit3"], "patch": 1}])
    def test_equal_ones_are_the_time_of_the_row(self, changes):
        model = build(pooled_text=True, frame_times=True, **changes)
        plain = build(pooled_text=True, **changes)
        assert list(model.state_dict()) == list(plain.state_dict())
        batch = inputs()
        each = {**batch, "time_B": batch["time_B"][:, None].expand(-1, 3)}
        expected = denoise(plain, **batch)
        torch.testing.assert_close(denoise(model, **batch), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(denoise(model, **each), expected, rtol=1e-5, atol=1e-6)

    def test_each_modulates_its_own_frame(self):
        """Where frames do not see each other, each is a clip of one frame at its time."""
        model = build(windows=((1, 0, 0),), frame_times=True, absolute_position=False)
        batch, times = inputs(), torch.tensor([[0.0, 500.0, 900.0], [20.0, 0.0, 7.0]])
        out = denoise(model, **{**batch, "time_B": times})
        for k in range(3):
            one = {**batch, "x_BCTHW": batch["x_BCTHW"][:, :, k : k + 1], "time_B": times[:, k]}
            torch.testing.assert_close(out[:, :, k : k + 1], denoise(model, **one), rtol=1e-4, atol=1e-5)
        assert (out - denoise(model, **{**batch, "time_B": times.flip(1)})).abs().max() > 1e-3


class TestRotationByTime:
    """RoPE of temporal blocks alone (STDiT3): spatial ones are not turned, and would not change if they were."""

    def test_of_a_frame_it_is_nothing(self):
        changes = {**FAMILIES["stdit3"], "patch": 1, "windows": ((1, 0, 0),), "absolute_position": False}
        turned = build(**{**changes, "windows": ((1, 0, 0), (0, 1, 1))})
        assert [block.attn.rope for block in turned.blocks.values()] == [False, True] * 2
        plain = build(**{**changes, "relative_position": "none"})
        for block in plain.blocks.values():
            block.attn.rope = True
        expected = build(**{**changes, "relative_position": "none"})
        torch.testing.assert_close(denoise(plain, **inputs()), denoise(expected, **inputs()), rtol=1e-4, atol=1e-4)

    def test_places_through_time_matter_by_their_differences(self):
        changes = {**FAMILIES["stdit3"], "patch": 1, "windows": ((0, 1, 1),)}
        model, plain = build(**changes), build(**{**changes, "relative_position": "none"})
        batch = inputs()
        assert (denoise(model, **batch) - denoise(plain, **batch)).abs().max() > 1e-3
        mirrored = {**batch, "x_BCTHW": batch["x_BCTHW"].flip(2)}
        # Without places in time a clip played backwards gives the answer backwards.
        torch.testing.assert_close(denoise(plain, **mirrored).flip(2), denoise(plain, **batch), rtol=1e-4, atol=1e-5)
        assert (denoise(model, **mirrored).flip(2) - denoise(model, **batch)).abs().max() > 1e-3


class TestChannelsOfGivenFrames:
    """Open-Sora-Plan: given frames and their mask beside the noisy latent, which add nothing at first."""

    def test_a_model_that_knew_none_stays_what_it_was(self):
        plain, told = build(), build(filled=False, given_channels=True)
        missing, unexpected = told.load_state_dict(plain.state_dict(), strict=False)
        assert (missing, unexpected) == (["embed.patch.given.weight"], [])
        assert torch.equal(denoise(told, **inputs()), denoise(plain, **inputs()))

    def test_they_are_a_longer_patch(self):
        """Two projections added are one of the channels side by side."""
        patch, both = PatchEmbed(3, (1, 2, 2), 12, given=True), PatchEmbed(7, (1, 2, 2), 12)
        initialise(patch, 0)
        with torch.no_grad():
            patch.given.weight.normal_()
            joined = [m.weight.unflatten(1, (4, -1)) for m in (patch.project, patch.given)]
            both.project.weight.copy_(torch.cat(joined, dim=2).flatten(1))
            both.project.bias.copy_(patch.project.bias.normal_())
        x, given = torch.randn(2, 3, 2, 4, 6), torch.randn(2, 4, 2, 4, 6)
        torch.testing.assert_close(patch(x, None, given), both(torch.cat((x, given), 1)), rtol=1e-5, atol=1e-5)
        assert torch.equal(patch(x), patch(x, None, torch.zeros_like(given)))

    def test_they_matter_once_they_are_trained(self):
        model, batch = build(given_channels=True), inputs()
        rest = {k: v for k, v in batch.items() if k != "x_BCTHW"}
        given = torch.zeros(2, CHANNELS + 1, *GRID)
        none = model(batch["x_BCTHW"], Grid(*GRID), **rest)
        assert torch.equal(none, model(batch["x_BCTHW"], Grid(*GRID, given_BCTHW=given), **rest))
        given[1, :, 0] = 1
        moved = (model(batch["x_BCTHW"], Grid(*GRID, given_BCTHW=given), **rest) - none).abs().amax((1, 2, 3, 4))
        assert moved[0] == 0
        assert moved[1] > 1e-3


class TestThroughTime:
    """GenTron: attention of places through time, which adds nothing at first, and nothing of others without motion."""

    def test_a_model_of_images_becomes_one_of_videos(self):
        """Its weights, and a zero: every frame is as the model of images makes it, bit for bit."""
        of_images = {**FAMILIES["gentron"], "patch": 1, "temporal_attention": False, "relative_position": "none"}
        images, videos = build(**of_images), build(filled=False, **{**FAMILIES["gentron"], "patch": 1})
        missing, unexpected = videos.load_state_dict(images.state_dict(), strict=False)
        assert unexpected == []
        assert {re.sub(r"\d+", "*", name) for name in missing} == {
            f"blocks.*.temporal.{part}.{leaf}"
            for part in ("query", "key", "value", "out")
            for leaf in ("weight", "bias")
        }
        batch = inputs()
        out = denoise(videos, **batch)
        assert torch.equal(out, denoise(images, **batch))
        for k in range(3):
            alone = denoise(images, **{**batch, "x_BCTHW": batch["x_BCTHW"][:, :, k : k + 1]})
            torch.testing.assert_close(out[:, :, k : k + 1], alone, rtol=1e-4, atol=1e-5)

    def test_it_learns_from_there(self):
        """The zero has a gradient, so what lies before it gets one in the next step."""
        model = build(filled=False, **{**FAMILIES["gentron"], "patch": 1})
        with torch.no_grad():
            model.head.project.weight.normal_(std=0.1)
        denoise(model, **inputs()).square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if ".temporal." in n}
        assert all(bool(grad.any()) == (".out." in name) for name, grad in grads.items())

    def test_order(self):
        """Through time comes between the text and the MLP, and adds what it finds to the stream of tokens."""
        model, seen = build(**{**FAMILIES["gentron"], "patch": 1}), []
        for name in ("attn", "cross", "temporal", "mlp"):
            part = model.blocks["0"].get_submodule(name)
            part.register_forward_hook(lambda *_, name=name: seen.append(name))
        denoise(model, **inputs())
        assert seen == ["attn", "cross", "temporal", "mlp"]

    @pytest.mark.parametrize("images", [False, True])
    def test_without_motion_frames_do_not_see_each_other(self, images):
        model, batch = build(**{**FAMILIES["gentron"], "patch": 1}), inputs(3)
        other = {**batch, "x_BCTHW": batch["x_BCTHW"].clone()}
        other["x_BCTHW"][:, :, 1:] *= -2
        marks = {"still_B": torch.tensor([True, False, False]), "image_B": torch.tensor([False, False, images])}

        def first_frame(rows):
            return model(rows["x_BCTHW"], Grid(*GRID, **marks), **{k: v for k, v in rows.items() if k != "x_BCTHW"})[
                :, :, 0
            ]

        moved = (first_frame(other) - first_frame(batch)).abs().amax((1, 2, 3))
        assert (moved > 1e-5).tolist() == [False, True, not images]

    def test_a_clip_without_motion_is_its_frames(self):
        model, batch = build(**{**FAMILIES["gentron"], "patch": 1}), inputs()
        rest = {k: v for k, v in batch.items() if k != "x_BCTHW"}
        out = model(batch["x_BCTHW"], Grid(*GRID, still_B=torch.tensor([True, True])), **rest)
        for k in range(3):
            alone = denoise(model, **{**batch, "x_BCTHW": batch["x_BCTHW"][:, :, k : k + 1]})
            torch.testing.assert_close(out[:, :, k : k + 1], alone, rtol=1e-4, atol=1e-5)


class TestImages:
    """A row of T independent images: each is alone in the world, at time 0, with its own caption."""

    def batch(self, frames=3, tokens=2):
        g = torch.Generator().manual_seed(3)
        return {
            "x_BCTHW": torch.randn(1, CHANNELS, frames, 4, 6, generator=g),
            "time_B": torch.tensor([300.0]),
            "text_BLE": torch.randn(1, frames * tokens, TEXT, generator=g),
            "text_frame_BL": torch.arange(frames).repeat_interleave(tokens)[None],
            "image_B": torch.tensor([True]),
        }

    def only(self, batch, k, tokens=2, visible=0):
        """Image k as a video of one latent frame."""
        text = slice(k * tokens, (k + 1) * tokens)
        frame = torch.full((1, tokens), visible)
        more = {"text_BLE": batch["text_BLE"][:, text], "text_frame_BL": frame}
        return {**batch, **more, "x_BCTHW": batch["x_BCTHW"][:, :, k : k + 1]}

    @pytest.mark.parametrize("keys_of", ["text", "video_and_text"])
    @pytest.mark.parametrize("relative", ["bias", "rope", "none"])
    def test_in_windows_of_one_frame_it_is_a_video_of_one_frame(self, relative, keys_of):
        model = build(windows=((1, 0, 0), (1, 2, 4)), relative_position=relative, cross_keys=keys_of)
        batch = self.batch()
        out = denoise(model, **batch)
        for k in range(3):
            alone = denoise(model, **self.only(batch, k))
            torch.testing.assert_close(out[:, :, k : k + 1], alone, rtol=1e-4, atol=1e-5)
            video = {**self.only(batch, k, visible=EVERY_FRAME), "image_B": None}
            torch.testing.assert_close(out[:, :, k : k + 1], denoise(model, **video), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "family",
        [*(FAMILIES[name] for name in CLIPS), JOINT_2B, STREAMS_2B],
        ids=[*CLIPS, "joint", "two streams, refined"],
    )
    def test_in_every_family_it_is_a_video_of_one_frame(self, family):
        plain = {"patch": 1, "text_padding": "masked", "pooled_text": False}
        model, batch = build(**{**family, **plain}), self.batch()
        out = denoise(model, **batch)
        for k in range(3):
            video = {**self.only(batch, k, visible=EVERY_FRAME), "image_B": None}
            torch.testing.assert_close(out[:, :, k : k + 1], denoise(model, **video), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("windows", [((0, 0, 0),), ((1, 0, 0), (2, 2, 4))])
    @pytest.mark.parametrize("cross_keys", ["text", "video_and_text"])
    def test_attending_within_the_frame_it_is_a_video_of_one_frame(self, windows, cross_keys):
        c = {"windows": windows, "image_attention": "frame", "cross_attention": "all", "cross_keys": cross_keys}
        model, batch = build(relative_position="rope", **c), self.batch()
        out = denoise(model, **batch)
        for k in range(3):
            video = {**self.only(batch, k, visible=EVERY_FRAME), "image_B": None}
            torch.testing.assert_close(out[:, :, k : k + 1], denoise(model, **video), rtol=1e-4, atol=1e-5)

    def test_in_space_time_windows_it_is_a_row_of_one_image(self):
        model, batch = build(), self.batch()
        alone = torch.cat([denoise(model, **self.only(batch, k)) for k in range(3)], dim=2)
        torch.testing.assert_close(denoise(model, **batch), alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("relative", ["bias", "rope", "none"])
    @pytest.mark.parametrize(
        ("cross", "keys_of"),
        [
            ("none", "text"),
            ("per_frame", "text"),
            ("per_frame", "video_and_text"),
            ("all", "text"),
            ("all", "video_and_text"),
        ],
    )
    def test_an_image_does_not_see_the_others(self, relative, cross, keys_of):
        model = build(relative_position=relative, cross_attention=cross, cross_keys=keys_of)
        batch = self.batch()
        out = denoise(model, **batch)
        other = {**batch, "x_BCTHW": batch["x_BCTHW"].clone(), "text_BLE": batch["text_BLE"].clone()}
        other["x_BCTHW"][:, :, 1:] *= -2
        other["text_BLE"][:, 2:] += 1
        moved = denoise(model, **other)
        torch.testing.assert_close(moved[:, :, 0], out[:, :, 0], rtol=1e-4, atol=1e-5)
        assert (moved[:, :, 1] - out[:, :, 1]).abs().max() > 1e-2

    @pytest.mark.parametrize("relative", ["bias", "rope", "none"])
    def test_its_place_in_the_row_does_not_matter(self, relative):
        model, batch = build(relative_position=relative), self.batch()
        order = [2, 0, 1]
        mixed = {**batch, "x_BCTHW": batch["x_BCTHW"][:, :, order]}
        mixed["text_BLE"] = batch["text_BLE"].unflatten(1, (3, 2))[:, order].flatten(1, 2)
        torch.testing.assert_close(denoise(model, **mixed), denoise(model, **batch)[:, :, order], rtol=1e-4, atol=1e-5)

    def test_a_clip_beside_it_is_as_without_it(self):
        model = build()
        clip, image = inputs(1, tokens=6), self.batch()
        del clip["pooled_BE"]
        both = {name: torch.cat((clip[name], image[name])) for name in clip}
        out = denoise(model, **both, image_B=torch.tensor([False, True]))
        torch.testing.assert_close(out[:1], denoise(model, **clip), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[1:], denoise(model, **image), rtol=1e-4, atol=1e-5)

    def test_a_clip_does_mix_its_frames(self):
        model, batch = build(), self.batch()
        del batch["image_B"]
        other = {**batch, "x_BCTHW": batch["x_BCTHW"].clone()}
        other["x_BCTHW"][:, :, 1:] *= -2
        assert (denoise(model, **other) - denoise(model, **batch))[:, :, 0].abs().max() > 1e-3


class TestGrids:
    @pytest.mark.parametrize("relative", ["bias", "rope", "none"])
    @pytest.mark.parametrize("grid", [(1, 4, 6), (2, 3, 6), (3, 2, 1)])
    def test_a_smaller_one_works(self, relative, grid):
        model = build(relative_position=relative)
        batch = inputs(grid=grid)
        assert denoise(model, **batch).shape == batch["x_BCTHW"].shape

    @pytest.mark.parametrize("grid", [(4, 4, 6), (3, 5, 6), (3, 4, 7)])
    def test_a_larger_one_needs_a_model_without_tables(self, grid):
        with pytest.raises(ValueError, match=re.escape(f"{grid} latent tokens exceeds the position tables' {GRID}")):
            denoise(build(), **inputs(grid=grid))
        for relative in ("bias", "rope", "none"):
            out = denoise(build(absolute_position=False, relative_position=relative), **inputs(grid=grid))
            assert out.shape[2:] == grid

    def test_patches_are_local(self):
        """Without attention across places, a pixel of a patch moves its own patch alone: order of the folding."""
        model = build(patch=2, windows=((1, 1, 1),), grid=(2, 3, 5), cross_attention="none")
        batch = inputs(1, grid=(2, 3, 5), patch=(1, 2, 2))
        other = {**batch, "x_BCTHW": batch["x_BCTHW"].clone()}
        other["x_BCTHW"][0, 1, 1, 2, 7] += 1  # patch row 1, patch column 3
        moved = (denoise(model, **other) - denoise(model, **batch)).abs().amax((0, 1)) > 0
        expected = torch.zeros(2, 6, 10, dtype=torch.bool)
        expected[1, 2:4, 6:8] = True
        assert torch.equal(moved, expected)


class TestPatches:
    """The order of a patch's numbers is part of every stored weight: row, column, channel."""

    def test_feature_order(self):
        patch = PatchEmbed(3, (1, 2, 2), 12)
        with torch.no_grad():
            patch.project.weight.copy_(torch.eye(12))
            patch.project.bias.zero_()
        x = torch.randn(2, 3, 2, 4, 6)
        inside = list(itertools.product(range(2), range(2), range(3)))
        expected = [
            torch.stack([x[:, c, t, 2 * h + p, 2 * w + q] for p, q, c in inside], -1)
            for t, h, w in itertools.product(range(2), range(2), range(3))
        ]
        torch.testing.assert_close(patch(x), torch.stack(expected, 1))

    def test_the_head_puts_them_back(self):
        patch, head = PatchEmbed(3, (1, 2, 2), 12), Head(Model(width=12, num_heads=2, patch=2), 3)
        initialise(head, 0)
        with torch.no_grad():
            patch.project.weight.copy_(torch.eye(12))
            patch.project.bias.zero_()
        x = torch.randn(2, 3, 2, 4, 6)
        head.project.register_forward_hook(lambda *_: patch(x))
        assert torch.equal(head(torch.zeros(2, 12, 12), torch.zeros(2, 7, 12), Grid(2, 2, 3)), x)


class TestPrecision:
    def test_bf16_compute_gives_fp32_output_and_gradients(self):
        model, batch = build(), inputs()
        exact = denoise(model, **batch).detach()
        model.dtype = torch.bfloat16
        tokens = []
        for block in model.blocks.values():
            block.register_forward_hook(lambda _, args, out: tokens.append((args[0].dtype, args[2].dtype, out.dtype)))
        out = denoise(model, **batch)
        out.square().mean().backward()
        assert out.dtype == torch.float32
        assert tokens == [(torch.bfloat16, torch.float32, torch.bfloat16)] * 4
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters() if p.numel())
        error = (out - exact).norm() / exact.norm()
        assert 1e-5 < error < 0.05

    def test_fp64_input_and_tables_run(self):
        """The fp32 islands stay fp32, so this says that dtypes meet, not that the result has fp64's precision."""
        model, batch = build().double(), inputs()
        model.dtype = torch.float64
        wide = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
        torch.testing.assert_close(denoise(model, **wide).float(), denoise(build(), **batch), rtol=1e-4, atol=1e-5)


class TestSelfConditioning:
    def test_none_is_zeros(self):
        model, batch = build(), inputs()
        zeros = torch.zeros_like(batch["x_BCTHW"])
        assert torch.equal(denoise(model, **batch), denoise(model, **batch, previous_BCTHW=zeros))
        assert (denoise(model, **batch) - denoise(model, **batch, previous_BCTHW=zeros + 1)).abs().max() > 1e-3

    def test_without_it_the_argument_has_no_effect(self):
        model, batch = build(self_conditioning=0.0), inputs()
        assert torch.equal(denoise(model, **batch), denoise(model, **batch, previous_BCTHW=batch["x_BCTHW"]))
