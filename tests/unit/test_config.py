"""A run's config: keys, values, faults, derived numbers, and that none of it needs torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from vidit.config import (
    PRESETS,
    ConfigError,
    Data,
    Diffusion,
    Model,
    RunConfig,
    Section,
    Text,
    Train,
    Vae,
    apply_overrides,
    field_names,
    resolve,
    whole_window,
)
from vidit.model.flops import parameter_count

ROOT = Path(__file__).parents[2]


def run(**changes):
    sections = {"vae": Vae(weights="vae"), "data": Data(train="clips"), **changes}
    return RunConfig(name="a", **sections)


def faults(**changes):
    with pytest.raises(ConfigError) as caught:
        resolve(run(**changes))
    return caught.value.faults


class TestSections:
    def test_frozen(self):
        config = run()
        with pytest.raises(ValidationError):
            config.name = "b"
        with pytest.raises(ValidationError):
            config.train.steps = 3

    def test_what_does_not_exist_is_refused(self):
        sections = [f.annotation for f in RunConfig.model_fields.values() if f.annotation is not str]
        assert len(sections) == 7
        for each in (*sections, RunConfig):
            assert issubclass(each, Section)
            with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
                each.model_validate({"name": "a", "colour": 1, "run_dir": ""})

    @pytest.mark.parametrize("name", ["a", "A.b-c_1", "0"])
    def test_names(self, name):
        assert run().model_copy(update={"name": name}).directory == Path("runs") / name
        assert RunConfig(name=name)

    @pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a b", "../a", "a\n"])
    def test_names_are_file_names(self, name):
        with pytest.raises(ValidationError):
            RunConfig(name=name)

    def test_directory(self):
        assert run(run_dir="/x/y").directory == Path("/x/y")
        assert run().directory == Path("runs/a")

    @pytest.mark.parametrize(
        "config",
        [
            RunConfig(name="a"),
            RunConfig(
                name="b",
                run_dir="x",
                text=Text(kind="t5", path="p"),
                vae=Vae(multipliers=(1, 2), num_res_blocks=(1, 1), decoder_res_blocks=(0, 2), spatial_down=(True,)),
                model=Model.preset("demo", windows=((1, 0, 0), (2, 3, 4))),
                diffusion=Diffusion(path="edm", target="edm", density="log_normal"),
                data=Data(validation="v", max_skipped=0.1),
                train=Train(learning_rate=3.3e-4, betas=(0.1, 0.2)),
            ),
        ],
    )
    def test_json_round_trip(self, config):
        assert RunConfig.model_validate_json(config.to_json()) == config
        assert RunConfig.model_validate(config.model_dump()) == config


class TestOverrides:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("train.steps=7", 7),
            ("train.learning_rate=3e-4", 3e-4),
            ("train.learning_rate=.5", 0.5),
            ("train.betas=[0.5, 0.75]", (0.5, 0.75)),
            ("model.windows=[[1,0,0],[0,2,2]]", ((1, 0, 0), (0, 2, 2))),
            ("vae.temporal_down=[false,true,true]", (False, True, True)),
            ("train.compile=true", True),
            ("train.compile=True", True),
            ("data.random_crop=false", False),
            ("vae.weights=none", None),
            ("vae.weights=null", None),
            ("vae.weights=some/folder", "some/folder"),
            ("vae.weights=12", "12"),
            ("data.train=none", "none"),
            ("data.train=true", "true"),
            ("data.train=a=b", "a=b"),
            ("name=123", "123"),
            ("run_dir=", ""),
            ("text.kind=t5", "t5"),
            ("sample.prompts=[\"a red ball\", \"b, c\"]", ("a red ball", "b, c")),
            ("sample.prompts=[]", ()),
        ],
    )  # fmt: skip
    def test_values(self, text, value):
        got = apply_overrides(run(), [text])
        for part in text.partition("=")[0].split("."):
            got = getattr(got, part)
        assert got == value
        assert type(got) is type(value)

    def test_the_rest_stays_and_the_last_wins(self):
        before = run(train=Train(steps=5, seed=3))
        after = apply_overrides(before, ["train.steps=6", "train.steps=7"])
        assert after == before.model_copy(update={"train": Train(steps=7, seed=3)})
        assert before.train.steps == 5
        assert apply_overrides(before, []) == before

    @pytest.mark.parametrize(
        ("text", "nearest"),
        [
            ("train.step=3", "train.steps"),
            ("trian.steps=3", "train.steps"),
            ("steps=3", "train.steps"),
            ("train.learningrate=3", "train.learning_rate"),
            ("model.head=3", "model.num_heads"),
            ("data.num_frame=3", "data.num_frames"),
            ("learning_rate=3", "train.learning_rate"),
        ],
    )
    def test_unknown_keys_name_the_nearest(self, text, nearest):
        with pytest.raises(ConfigError, match=r"unknown key '[a-z_.]+'; nearest: ") as caught:
            apply_overrides(run(), [text])
        assert nearest in str(caught.value)

    def test_unknown_key_with_nothing_near(self):
        with pytest.raises(ConfigError, match="nearest: none; see `vidit config CONFIG`"):
            apply_overrides(run(), ["qqqqqqqqqqqqqq=3"])

    @pytest.mark.parametrize("text", ["train.steps.x=3", "train..steps=3", ".train=3", "=3", "train.__class__=1"])
    def test_odd_keys_are_unknown(self, text):
        with pytest.raises(ConfigError, match="unknown key"):
            apply_overrides(run(), [text])

    def test_sections_and_missing_equals(self):
        with pytest.raises(ConfigError, match=r"sample is a section; set one of its fields: sampler num_steps"):
            apply_overrides(run(), ["sample=3"])
        with pytest.raises(ConfigError, match=r"'train.steps' has no '='; write section.key=value"):
            apply_overrides(run(), ["train.steps"])

    @pytest.mark.parametrize(
        "text",
        [
            "train.steps=0", "train.steps=1.5", "train.steps=many", "train.steps=none", "train.learning_rate=nan",
            "train.betas=[0.5]", "train.betas=0.5", "train.compile=maybe", "text.kind=T5", "model.windows=[1,0,0]",
            "data.caption_dropout=1", "sample.prompts=a red ball", "name=a/b",
        ],
    )  # fmt: skip
    def test_bad_values_name_key_and_value(self, text):
        key, _, value = text.partition("=")
        with pytest.raises(ConfigError) as caught:
            apply_overrides(run(), [text])
        assert all(f.startswith(key) for f in caught.value.faults)
        assert value.strip("[]").split(",")[0].split(".")[0] in str(caught.value).replace("None", "none")

    def test_all_faults_at_once(self):
        with pytest.raises(ConfigError) as caught:
            apply_overrides(run(), ["train.stepz=3", "data.height", "train.steps=-1", "model.width=no", "model=1"])
        assert len(caught.value.faults) == 5
        text = str(caught.value)
        assert text.startswith("5 faults:\n- ")
        for part in ("train.stepz", "'data.height'", "train.steps=-1", "model.width='no'", "model is a section"):
            assert part in text

    def test_one_fault_is_one_line(self):
        with pytest.raises(ConfigError) as caught:
            apply_overrides(run(), ["train.stepz=3"])
        assert str(caught.value) == caught.value.faults[0]

    def test_field_names_are_all_settable(self):
        names = list(field_names())
        assert len(names) == len(set(names)) > 80
        assert {"name", "run_dir", "train.steps", "vae.weights"} <= set(names)
        tree = run().model_dump()
        for name in names:
            section, _, leaf = name.rpartition(".")
            assert leaf in (tree[section] if section else tree)


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

    def test_images(self):
        r = resolve(run(data=Data(train="x", num_frames=1)))
        assert r.latent_frames == 1
        assert r.windows == ((1, 16, 16), (1, 8, 8))

    def test_strides(self):
        vae = Vae(weights="x", patch=2, spatial_down=(True, False, True), temporal_down=(True, False, True))
        assert (vae.spatial_stride, vae.temporal_stride) == (8, 4)
        assert (Vae().spatial_stride, Vae().temporal_stride) == (8, 4)

    def test_whole_window(self):
        assert whole_window((0, 8, 3), (5, 4, 6)) == (5, 4, 3)

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
            ({"model": Model(width=64, num_heads=16, relative_position="rope")}, ["rope", "divisible by 8, not 4"]),
            ({"model": Model(windows=((1, -1, 0),))}, ["model.windows", "negative"]),
            ({"model": Model(attention_backend="flash")}, ["attention_backend=flash", "rope"]),
            ({"vae": Vae()}, ["vae.weights is not set"]),
            ({"vae": Vae(weights="x", num_res_blocks=(1,))}, ["vae.num_res_blocks has 1 entries for 4 levels"]),
            ({"vae": Vae(weights="x", spatial_down=(True,) * 4)}, ["vae.spatial_down has 4 entries", "3 joints"]),
            ({"vae": Vae(weights="x", latent_channels=7)}, ["vae.latent_channels=7", "512"]),
            ({"data": Data()}, ["data.train is not set"]),
            ({"data": Data(train="x", image_rows=33)}, ["data.image_rows=33", "train.micro_batch=32"]),
            ({"data": Data(train="x", cache_latents=True, random_crop=True)}, ["data.cache_latents", "random_crop"]),
            ({"train": Train(steps=5, warmup_steps=6)}, ["train.warmup_steps=6", "train.steps=5"]),
            ({"text": Text(kind="clip")}, ["text.kind=clip", "text.path"]),
            ({"diffusion": Diffusion(target="eps")}, ["diffusion.target=eps", "flow x v"]),
            ({"diffusion": Diffusion(path="vp", target="eps")}, ["zero terminal SNR"]),
            ({"diffusion": Diffusion(density="log_normal")}, ["diffusion.density=log_normal", "uniform logit_normal"]),
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
        resolve(run(vae=Vae(), train=Train(task="vae"), model=Model(patch=3)))

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


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_preset(self, name):
        c = Model.preset(name)
        assert (c.num_layers, c.width, c.num_heads, c.mlp_width) == PRESETS[name][:4]
        assert not list(c.faults())

    def test_changes_win(self):
        c = Model.preset("SR1", patch=1, num_layers=2)
        assert (c.patch, c.num_layers, c.cross_attention) == (1, 2, "all")

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"no model preset 'XXL'; use one of demo S B L XL SR1 SR2 3B 7B"):
            Model.preset("XXL")

    def test_sizes_grow(self):
        sizes = [
            parameter_count(Model.preset(n), (5, 16, 16), 8, 256) for n in ("S", "B", "L", "XL", "SR1", "3B", "7B")
        ]
        assert sizes == sorted(sizes)


class TestWithoutTorch:
    def python(self, code):
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)

    def test_config_and_cli_import_no_torch(self):
        modules = [
            "vidit.config",
            "vidit.cli",
            "vidit.describe",
            "vidit.model.flops",
            "vidit.vae.stored",
            "configs.demo",
        ]
        code = (
            f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
            "print(sorted({m.split('.')[0] for m in sys.modules} & "
            "{'torch', 'numpy', 'transformers', 'av', 'tensorboard', 'matplotlib', 'einops'}))"
        )
        done = self.python(code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"

    def test_help_runs(self):
        code = (
            "import sys\nfrom vidit.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
            "assert 'torch' not in sys.modules"
        )
        done = self.python(code)
        assert done.returncode == 0, done.stderr
        for command in ("train", "config", "pack", "scenes", "sample", "evaluate", "report"):
            assert f"\n    {command}" in done.stdout

    def test_describe_is_json_and_needs_no_torch(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from vidit.config import *\n"
            "def mine():\n    return RunConfig(name='a', vae=Vae(), data=Data(train='x'), train=Train(task='vae'))\n"
        )
        command = f"main(['config', {str(tmp_path / 'mine.py')!r}, 'train.steps=3'])"
        done = self.python(f"import sys\nfrom vidit.cli import main\n{command}\nassert 'torch' not in sys.modules")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["config"]["train"]["steps"] == 3
        assert told["derived"]["clips_total"] == 96
        assert told["derived"]["run_dir"] == "runs/a"

    def test_a_fault_is_one_message_and_status_1(self, tmp_path):
        (tmp_path / "mine.py").write_text("from vidit.config import *\ndef mine():\n    return RunConfig(name='a')\n")
        done = self.python(
            f"import sys\nfrom vidit.cli import main\nsys.exit(main(['config', {str(tmp_path / 'mine.py')!r}]))"
        )
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("vidit: 2 faults:\n- ")
        assert "Traceback" not in done.stderr
