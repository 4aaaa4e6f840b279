"""A run's config: keys, values, faults, derived numbers, and that none of it needs torch."""

import json
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
from pydantic import ValidationError

from vidit.config import (
    FAMILIES,
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
    whole_window,
)
from vidit.model.flops import parameter_count
from vidit.overrides import apply_overrides, field_names, flat

ROOT = Path(__file__).parents[2]


def run(**changes):
    sections = {"vae": Vae(weights="vae"), "data": Data(train="clips"), **changes}
    return RunConfig(name="a", **sections)


class TestSections:
    def test_frozen(self):
        config = run()
        with pytest.raises(ValidationError):
            config.name = "b"
        with pytest.raises(ValidationError):
            config.train.steps = 3

    def test_what_does_not_exist_is_refused(self):
        sections = [f.annotation for f in RunConfig.model_fields.values() if f.annotation is not str]
        assert len(sections) == 11
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

    def test_what_was_not_set_stays_unset(self):
        after = apply_overrides(run(), ["vae.latent_channels=8"])
        assert after.vae.model_fields_set == {"weights", "latent_channels"}
        assert after.model_fields_set == run().model_fields_set

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
            "data.caption_dropout=1", "train.betas=[1, 0.9]", "train.betas=[0.9, -0.1]", "vae.num_res_blocks=[-1]",
            "vae.decoder_res_blocks=[1, -2]", "vae.multipliers=[1, 0]", "data.fps=1001",
            "sample.prompts=a red ball", "name=a/b",
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

    def test_whole_window(self):
        assert whole_window((0, 8, 3), (5, 4, 6)) == (5, 4, 3)

    def test_field_names_are_all_settable(self):
        names = list(field_names())
        assert len(names) == len(set(names)) > 80
        assert {"name", "run_dir", "train.steps", "vae.weights"} <= set(names)
        tree = run().model_dump()
        for name in names:
            *sections, leaf = name.split(".")
            assert leaf in reduce(lambda own, section: own[section], sections, tree)


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_preset(self, name):
        c = Model.preset(name)
        assert (c.num_layers, c.width, c.num_heads, c.mlp_width) == PRESETS[name][:4]
        assert not list(c.faults())

    def test_changes_win(self):
        c = Model.preset("SR1", patch=1, num_layers=2)
        assert (c.patch, c.num_layers, c.cross_attention) == ((1, 1, 1), 2, "all")

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_family_has_no_faults(self, family):
        assert not list(Model(**FAMILIES[family]).faults())

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"cross_attention": "all", "cross_keys": "text"},
             "model.text_weights=own and model.num_single_layers=2 treat text as tokens beside the video's; set "
             "model.cross_attention=joint"),
            ({"num_single_layers": 24}, "model.num_single_layers=24 of model.num_layers=24: use fewer than 24"),
            ({"num_single_layers": 25, "text_weights": "shared"}, "=25 of model.num_layers=24: use at most 24"),
            ({"num_single_layers": 0}, "weights for text would reach no output; set model.num_single_layers to at"),
            ({"adaln_rank": 2}, "set model.modulation=projected and model.adaln_rank=0"),
            ({"modulation": "table"}, "set model.modulation=projected and model.adaln_rank=0"),
            ({"norm_affine": True}, "no norms with scale and shift for the text; set model.norm_affine=false"),
            ({"num_refiner_layers": 1, "text_embedding": "mlp"},
             "model.num_refiner_layers=1 refines what text_embedding=linear gives, not mlp"),
        ],
    )  # fmt: skip
    def test_what_streams_exclude(self, changes, says):
        (fault,) = Model(**{**FAMILIES["flux"], **changes}).faults()
        assert says in fault

    def test_yes_and_no_are_names(self):
        """Configs that were written when these were switches."""
        c = Model(qk_norm=True, absolute_position=False)
        assert (c.qk_norm, c.absolute_position) == ("head", "none")
        assert Model(patch=2).patch == (1, 2, 2)
        assert (Model(qk_norm=False).qk_norm, Model(absolute_position=True).absolute_position) == ("none", "learned")

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
            "vidit.overrides",
            "vidit.resolve",
            "vidit.idle",
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


@pytest.mark.parametrize("name", field_names())
def test_every_field_takes_its_own_value_on_the_command_line(name):
    config = RunConfig(name="a")
    value = flat(config)[name]
    text = json.dumps(value) if not isinstance(value, str) else value
    assert flat(apply_overrides(config, [f"{name}={text}"]))[name] == value


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_choice_of_numbers(level):
    assert apply_overrides(RunConfig(name="a"), [f"parallel.zero={level}"]).parallel.zero == level


def test_what_runs_were_begun_with_is_read() -> None:
    """`auto`, which took flash-attn where it was installed."""
    tree = {"name": "old", "model": {"attention_backend": "auto"}, "unet": {"attention_backend": "auto"}}
    config = RunConfig.model_validate(tree)
    assert (config.model.attention_backend, config.unet.attention_backend) == ("sdpa", "sdpa")
