"""A run as a whole: every fault at once with its cure, and the derived numbers."""

import pytest
from pydantic import ValidationError

from vidit.config import (
    ConfigError,
    Data,
    Diffusion,
    Given,
    Launch,
    Model,
    Parallel,
    RunConfig,
    Sample,
    Text,
    Train,
    Vae,
)
from vidit.resolve import faults as all_faults
from vidit.resolve import resolve


def run(**changes):
    sections = {"vae": Vae(weights="vae"), "data": Data(train="clips"), **changes}
    return RunConfig(name="a", **sections)


def faults(**changes):
    with pytest.raises(ConfigError) as caught:
        resolve(run(**changes))
    return caught.value.faults


def vp(**changes):
    return Diffusion(path="vp", target="v", **changes)


def edm(**changes):
    return Diffusion(path="edm", target="edm", density="log_normal", **changes)


JOINT = {"cross_attention": "joint", "windows": ((0, 0, 0),), "relative_position": "none", "image_attention": "frame"}


class TestResolve:
    def test_numbers(self):
        config = run(
            data=Data(train="x", num_frames=9, height=64, width=96),
            model=Model(patch=2, windows=((1, 0, 0), (2, 3, 99)), width=48, num_heads=3),
            train=Train(global_batch=24, micro_batch=2, steps=10),
        )
        r = resolve(config, 4)
        assert (r.latent_frames, r.latent_height, r.latent_width) == (3, 8, 12)
        assert r.grid == (3, 4, 6)
        assert r.tokens_per_clip == 72
        assert r.windows == ((1, 4, 6), (2, 3, 6))
        assert (r.head_dim, r.data_ranks, r.accumulation, r.clips_total) == (16, 4, 3, 240)

    @pytest.mark.parametrize(
        ("layout", "ranks", "data_ranks", "shard"),
        [
            ({}, 6, 6, 6),
            ({"tensor": 2}, 6, 3, 3),
            ({"replicate": 2, "sequence": 2}, 8, 4, 2),
            ({"pipeline": 2, "tensor": 2, "shard": 3}, 12, 3, 3),
            ({"pipeline": 2, "tensor": 2, "shard": 3}, None, 3, 3),
        ],
    )
    def test_layouts(self, layout, ranks, data_ranks, shard):
        r = resolve(run(parallel=Parallel(**layout), train=Train(global_batch=12, micro_batch=1)), ranks)
        assert (r.num_ranks, r.data_ranks, r.shard) == (ranks or 12, data_ranks, shard)
        assert r.accumulation == 12 // data_ranks

    def test_ranks_launched_here(self):
        config = run(launch=Launch(local=4), parallel=Parallel(sequence=2), train=Train(global_batch=4, micro_batch=1))
        assert resolve(config).data_ranks == 2
        assert resolve(config, 8).data_ranks == 4, "those that are there, not those that are launched here"

    @pytest.mark.parametrize(
        ("layout", "ranks", "parts"),
        [
            ({"tensor": 2, "sequence": 4}, 12, ["sequence 4 x tensor 2 takes 8 ranks", "12", "multiple of 8"]),
            ({"tensor": 2}, None, ["takes 2 ranks", "the 1 that there are", "launch.local=2"]),
            ({"tensor": 2, "shard": 2}, 8, ["tensor 2 x shard 2 takes 4", "there are 8", "start 4", "shard=4"]),
            ({"tensor": 2, "shard": 2}, 9, ["takes 4 ranks, but there are 9", "start 4"]),
        ],
    )
    def test_degrees_that_do_not_multiply_to_the_ranks(self, layout, ranks, parts):
        config = run(parallel=Parallel(**layout), train=Train(global_batch=64, micro_batch=1))
        with pytest.raises(ConfigError) as caught:
            resolve(config, ranks)
        (line,) = caught.value.faults
        assert all(part in line for part in parts), line

    def test_images(self):
        r = resolve(run(data=Data(train="x", num_frames=1)))
        assert r.latent_frames == 1
        assert r.windows == ((1, 16, 16), (1, 8, 8))

    def test_strides(self):
        vae = Vae(weights="x", patch=2, spatial_down=(True, False, True), temporal_down=(True, False, True))
        assert (vae.spatial_stride, vae.temporal_stride) == (8, 4)
        assert (Vae().spatial_stride, Vae().temporal_stride) == (8, 4)

    def test_three_faults_are_three_lines(self):
        found = faults(data=Data(train="x", height=100, num_frames=16), train=Train(global_batch=10, micro_batch=4))
        assert len(found) == 3
        assert "data.height=100" in found[0]
        assert "96 104" in found[0]
        assert "data.num_frames=16" in found[1]
        assert "use 13 or 17" in found[1]
        assert "train.global_batch=10" in found[2]
        assert "4 x 1 = 4" in found[2]

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"data": Data(train="x", width=4)}, ["data.width=4", "use one of 8"]),
            ({"model": Model(width=100, num_heads=16)}, ["model.width=100", "num_heads=16", "1 2 4 5 10 20 25 50"]),
            (
                {"model": Model(width=64, num_heads=16, relative_position="rope")},
                ["even head dim of at least 6, not 4"],
            ),
            ({"model": Model(width=63, num_heads=7, relative_position="rope")}, ["even head dim of at least 6, not 9"]),
            (
                {
                    "model": Model(frame_times=True),
                    "diffusion": Diffusion(path="vp", target="v", given=(Given(kind="random", share=1),)),
                },
                ["model.frame_times=true shows given frames clean", "diffusion.path=flow"],
            ),
            ({"model": Model(windows=((1, -1, 0),))}, ["model.windows", "negative"]),
            ({"model": Model(**{**JOINT, "windows": ((1, 0, 0),)})}, ["=joint attends to all tokens", "[[0,0,0]]"]),
            ({"model": Model(**{**JOINT, "relative_position": "bias"})}, ["no position bias", "rope or none"]),
            ({"model": Model(**{**JOINT, "image_attention": "identity"})}, ["cannot let images pass", "=frame"]),
            ({"model": Model(**JOINT, attention_backend="flash")}, ["takes no mask over text", "use sdpa"]),
            (
                {"model": Model(width=40, num_heads=2, absolute_position="sincos")},
                ["divisible by 16", "not 40", "32 or 48"],
            ),
            ({"model": Model(absolute_position="space_then_time", windows=((1, 0, 0),))}, ["spans latent frames"]),
            (
                {"model": Model(patch=(2, 1, 1)), "data": Data(train="x", num_frames=17)},
                ["data.num_frames=17 is 5 latent frames", "the 2 of model.patch", "one of 13 21"],
            ),
            (
                {"model": Model(patch=(5, 1, 1)), "data": Data(train="x", num_frames=17, image_rows=1)},
                ["puts latent frames together", "data.image_rows=1"],
            ),
            (
                {"model": Model(**{**JOINT, "relative_position": "rope"}), "data": Data(train="x", image_rows=1)},
                ["data.image_rows=1 puts images at times", "relative_position=rope", "num_frames=1"],
            ),
            ({"model": Model(text_padding="seen")}, ["text_padding=seen", "cross_keys=text"]),
            (
                {"model": Model(text_padding="seen", cross_keys="text"), "data": Data(train="x", image_rows=2)},
                ["text_padding=seen does not go with data.image_rows=2", "num_frames=1"],
            ),
            ({"model": Model(time_width=512)}, ["time_width=512 is not model.width=1024", "adaln_rank=0"]),
            ({"model": Model(attention_backend="flash")}, ["attention_backend=flash", "rope"]),
            ({"vae": Vae()}, ["vae.weights is not set"]),
            ({"vae": Vae(weights="x", num_res_blocks=(1,))}, ["vae.num_res_blocks has 1 entries for 4 levels"]),
            ({"vae": Vae(weights="x", spatial_down=(True,) * 4)}, ["vae.spatial_down has 4 entries", "3 joints"]),
            ({"vae": Vae(weights="x", latent_channels=7)}, ["vae.latent_channels=7", "512"]),
            ({"data": Data()}, ["data.train is not set"]),
            ({"data": Data(train="x", image_rows=33)}, ["data.image_rows=33", "train.micro_batch=32", "at most 31"]),
            ({"data": Data(train="x", image_rows=32)}, ["data.image_rows=32", "train.micro_batch=32", "at most 31"]),
            ({"data": Data(train="x", cache_latents=True, random_crop=True)}, ["data.cache_latents", "random_crop"]),
            ({"train": Train(steps=5, warmup_steps=6)}, ["train.warmup_steps=6", "train.steps=5"]),
            ({"text": Text(kind="clip")}, ["text.kind=clip", "text.path"]),
            ({"text": Text(width=63, num_heads=3)}, ["text.width=63 must be even"]),
            ({"text": Text(width=64, num_heads=3)}, ["text.width=64", "text.num_heads=3; use one of 1 2 4 8"]),
            ({"text": Text(hash_buckets=2)}, ["text.hash_buckets=2", "at least 3"]),
            ({"diffusion": Diffusion(target="eps")}, ["diffusion.target=eps", "flow x v"]),
            ({"diffusion": Diffusion(path="vp", target="eps")}, ["zero terminal SNR"]),
            ({"diffusion": Diffusion(density="log_normal")}, ["diffusion.density=log_normal", "uniform logit_normal"]),
            ({"diffusion": vp(beta_start=0.5)}, ["beta_start=0.5", "beta_end=0.02", "swap"]),
            ({"diffusion": vp(shift="constant")}, ["diffusion.shift=constant", "diffusion.snr_shift"]),
            ({"diffusion": vp(num_train_steps=20)}, ["sample.num_steps=50", "num_train_steps=20", "at most 20"]),
            ({"diffusion": edm(sigma_min=90.0)}, ["sigma_min=90", "sigma_max=80"]),
            ({"diffusion": edm(weighting="min_snr")}, ["weighting=min_snr", "use none"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
    )
    def test_a_fault_says_what_and_how_to_cure_it(self, changes, parts):
        found = faults(**changes)
        assert len(found) >= 1
        assert all(part in found[0] for part in parts), found

    def test_the_cure_works(self):
        """Every number that a message offers is legal."""
        for height in (96, 104):
            resolve(run(data=Data(train="x", height=height)))
        for frames in (13, 17):
            resolve(run(data=Data(train="x", num_frames=frames)))

    def test_a_vae_run_needs_neither_weights_nor_patches(self):
        resolve(run(vae=Vae(), train=Train(task="vae"), data=Data(train="x", height=8, width=24)))

    @pytest.mark.parametrize("rows", [4, 5])
    def test_a_vae_run_needs_a_clip_in_every_micro_batch(self, rows):
        train = Train(task="vae", global_batch=4, micro_batch=4)
        (found,) = faults(vae=Vae(), train=train, data=Data(train="x", image_rows=rows))
        assert f"data.image_rows={rows} leaves no row for a clip in train.micro_batch=4; use at most 3" in found
        resolve(run(vae=Vae(), train=train, data=Data(train="x", image_rows=3)))

    def test_a_vae_run_needs_a_loss(self):
        nothing = Vae(l1_weight=0, l2_weight=0, kl_weight=0)
        (found,) = faults(vae=nothing, train=Train(task="vae"))
        assert "are all 0" in found
        assert "set vae.l1_weight=1" in found

    def test_faults_of_every_section_come_together(self):
        found = "\n".join(
            faults(
                text=Text(width=30, num_heads=4, hash_buckets=1, path="x"),
                model=Model(width=100, num_heads=16),
                diffusion=Diffusion(path="vp", target="v", shift="constant", beta_start=0.5, num_train_steps=20),
                data=Data(train="", image_rows=32, height=100),
                train=Train(warmup_steps=2000, final_learning_rate=0.1),
            )
        )
        for part in (
            "text.width=30", "text.hash_buckets=1", "text.path=x", "model.width=100", "diffusion.shift=constant",
            "beta_start=0.5", "sample.num_steps=50", "data.train is not set", "data.image_rows=32", "data.height=100",
            "train.warmup_steps=2000", "train.final_learning_rate=0.1",
        ):  # fmt: skip
            assert found.count(part) == 1, part

    def test_a_folder_that_cannot_be_read_hides_its_strides_alone(self):
        wrong = run(data=Data(train="", height=100), vae=Vae(weights="x", latent_channels=7))
        assert list(all_faults(wrong, geometry_known=False)) == [
            "data.train is not set; give a folder written by `vidit pack`, or several as data.mixture"
        ]
        assert len(list(all_faults(wrong))) == 3

    def test_ranks_count(self):
        config = run(train=Train(global_batch=24, micro_batch=4))
        assert resolve(config, 3).accumulation == 2
        with pytest.raises(ConfigError, match=r"4 x 4 = 16; use a multiple of 16"):
            resolve(config, 4)

    def test_it_is_pure(self):
        config = run()
        assert resolve(config) == resolve(config)
        assert config == run()

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param(
                {"vae": Vae(weights="x", base_channels=4, multipliers=(1, 1, 2, 4), latent_channels=4,
                            spatial_down=(True, True, False), temporal_down=(True, False, False),
                            num_res_blocks=(1,) * 4)},
                id="a joint that does not divide",
            ),
            pytest.param(
                {"model": Model(windows=((0, 0, 0),))}, id="no block reads the text"
            ),
            pytest.param(
                {"model": Model(attention_backend="flash", relative_position="rope")},
                id="flash with a mask",
            ),
        ],
    )  # fmt: skip
    def test_faults_that_no_section_sees_alone(self, changes):
        assert len(faults(**changes)) >= 1

    @pytest.mark.parametrize(("section", "field"), [(Model, "windows"), (Vae, "multipliers")])
    def test_empty_tables(self, section, field):
        with pytest.raises(ValidationError, match=field):
            section(**{field: ()})


class TestCaptionsThatNoLayerReads:
    BLIND = Model(cross_attention="none")

    def test_dropout_and_guidance_are_named_with_their_cure(self):
        dropout, guidance = faults(model=self.BLIND)
        assert "data.caption_dropout=0.1 has no effect: model.cross_attention=none" in dropout
        assert "set it to 0" in dropout
        assert "sample.guidance=7.5 has no effect" in guidance
        assert "set it to 1" in guidance

    def test_the_cure_works(self):
        resolve(run(model=self.BLIND, data=Data(train="x", caption_dropout=0), sample=Sample(guidance=1)))

    def test_pooled_text_is_enough(self):
        resolve(run(model=Model(cross_attention="none", pooled_text=True)))

    def test_a_first_encoder_that_is_not_read(self):
        text = Text(kind="t5", path="a", second={"kind": "clip", "path": "b"})
        with pytest.raises(ConfigError, match=r"text\.kind=t5 has no effect: .* give text\.second\.kind=clip as text"):
            resolve(run(text=text, model=Model(cross_attention="none", pooled_text=True)))
        resolve(run(text=text, model=Model(pooled_text=True)))


@pytest.mark.parametrize(("preset", "head_dim"), [("XL", 72), ("SR1", 88), ("demo", 32)])
def test_rope_fits_every_preset(preset, head_dim):
    config = run(model=Model.preset(preset, relative_position="rope", patch=2))
    assert resolve(config).head_dim == head_dim
