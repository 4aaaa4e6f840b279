"""The architecture as a test: who imports whom, which options are read, what an import may do (docs: design 1-3)."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vidit", "parallel", "launch", "configs", "cluster", "benchmarks")
FOLDERS = {*PACKAGES, "tests", "docs"}
IGNORED = {"runs", "build", "dist", "__pycache__"}  # by .gitignore
ABSENT_IN_THE_COPY = ("parallel", "launch", "cluster", "configs", "benchmarks")


class Rule(NamedTuple):
    """What the files under a package may import: `ours` by prefix; None = any third-party package."""

    ours: tuple[str, ...]
    third_party: tuple[str, ...] | None = None
    distributed: bool = False


CONFIG = ("vidit.config", "vidit.keys", "vidit.dtypes", "vidit.whole_file")
MODULES = ("vidit.model", "vidit.diffusion", "vidit.vae", "vidit.text", "vidit.data")
RESOLVE = ("vidit.overrides", "vidit.resolve")
RUN = (
    "vidit.batching",
    *CONFIG,
    *RESOLVE,
    *MODULES,
    "vidit.train",
    "vidit.sample",
    "vidit.evaluate",
    "vidit.export",
    "vidit",
    "parallel",
)
# The longest prefix that fits a module decides. Own package always allowed.
TABLE = {
    "vidit.config": Rule((), ("pydantic",)),
    "vidit.overrides": Rule(("vidit.config",), ("pydantic",)),
    "vidit.idle": Rule(("vidit.config", "vidit.overrides"), ()),
    "vidit.resolve": Rule(("vidit.config", "vidit.idle", "vidit.data.selection"), ()),
    "vidit.batching": Rule(("vidit.config", "vidit.resolve", "vidit.model.flops", "vidit.text.width"), ()),
    "vidit.keys": Rule((), ("numpy", "torch")),
    "vidit.dtypes": Rule((), ("torch",)),
    "vidit.whole_file": Rule((), ()),
    "vidit.model": Rule(CONFIG),
    "vidit.diffusion": Rule(CONFIG),
    "vidit.vae": Rule(CONFIG),
    # `vidit config` reads the folder
    "vidit.vae.stored": Rule(("vidit.config", "vidit.resolve", "vidit.vae.catalog", "vidit.vae.place"), ("pydantic",)),
    "vidit.vae.catalog": Rule(("vidit.config",), ()),
    "vidit.vae.place": Rule(("vidit.config", "vidit.vae.catalog"), ("huggingface_hub",)),
    "vidit.text": Rule(CONFIG),
    "vidit.text.width": Rule(("vidit.config",), ()),  # `vidit config` counts with it
    "vidit.data.selection": Rule((), ()),  # `vidit config` checks the rules of data.select
    "vidit.data": Rule(
        (*CONFIG, "vidit.text.encoder", "vidit.batching")
    ),  # CaptionTokenizer and TextTokens, the loader's interface
    "vidit.train": Rule(RUN, distributed=True),
    # The arithmetic of a layout: the command line checks it before ranks are started.
    "vidit.train.layout": Rule(
        (
            "vidit.config",
            "vidit.resolve",
            "vidit.model.flops",
            "vidit.text.width",
            "parallel.layout",
            "parallel.kinds",
            "parallel.dealing",
            "parallel.stages",
            "parallel.parts",
        ),
        (),
    ),
    "vidit.sample": Rule(RUN, distributed=True),
    "vidit.evaluate": Rule(RUN, distributed=True),
    "vidit.export": Rule(RUN, distributed=True),
    # `vidit config` describes a run on a login node.
    "vidit.describe": Rule(
        (
            "vidit.batching",
            "vidit.config",
            "vidit.resolve",
            "vidit.model.flops",
            "vidit.text.width",
            "vidit.vae.stored",
            "vidit.train.layout",
            "parallel.planner",
        ),
        (),
    ),
    # Each command imports what it needs when it is called; at import those that parse a config (tested below).
    "vidit.config_source": Rule(
        ("vidit.config", "vidit.overrides", "vidit.resolve", "vidit.vae.stored"), ("pydantic",)
    ),
    "vidit.options": Rule((), ()),
    "vidit.cli": Rule(("vidit", "launch", "parallel.planner"), ("pydantic",)),
    "parallel": Rule((), ("torch", "safetensors", "pydantic", "deepspeed", "megatron"), distributed=True),
    "parallel.planner": Rule((), ("pydantic",)),
    "parallel.failure": Rule((), ()),
    "configs": Rule(("vidit.config",), ()),
    "launch": Rule(
        ("vidit.config", "vidit.whole_file", "parallel.planner", "parallel.failure"), ("pydantic", "jinja2")
    ),
    "launch.ray_nodes": Rule(  # the arithmetic of a layout, for the numbers of nodes that a driver may be left with
        ("vidit.config", "vidit.config_source", "vidit.train.layout", "vidit.vae.stored", "launch"), ()
    ),
    "launch.ray_gang": Rule(("launch",), ("ray",)),
    "launch.ray_driver": Rule(("launch",), ("ray",)),
    "launch.ray_backend": Rule(("launch", "vidit.config"), ("ray",)),
    "cluster.health": Rule((), ("torch",), distributed=True),
    "cluster": Rule((), ()),
}


class Import(NamedTuple):
    path: Path
    module: str
    target: str
    line: int
    top: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.module} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path, text: str | None = None) -> Iterator[Import]:
    """Every import of a file, at any depth; `from a import b` is a.b where that is a module of ours."""
    tree, module = ast.parse(text or path.read_text()), module_name(path)
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts if path.name == "__init__.py" else parts[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            is_ours = base.split(".")[0] in PACKAGES
            targets = [w if not is_ours or is_module(w) else base for w in whole]
        else:
            continue
        yield from (Import(path, module, target, node.lineno, node in top) for target in dict.fromkeys(targets))


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def allowed(found: Import) -> bool:
    keys = [prefix for prefix in TABLE if under(found.module, prefix)]
    if not keys:
        return found.module == "vidit"  # its __init__ imports nothing: tested below
    prefix = max(keys, key=len)
    rule, package = TABLE[prefix], found.target.split(".")[0]
    if package in sys.stdlib_module_names:
        return True
    if package in PACKAGES:
        if found.module.split(".")[0] == "parallel" and prefix == "parallel":
            return under(found.target, "parallel")
        exact = tuple(p for p in rule.ours if p != "vidit" or prefix == "vidit.cli")
        fits = any(under(found.target, p) for p in exact) or ("vidit" in rule.ours and found.target == "vidit")
        return fits or under(found.target, prefix)
    if under(found.target, "torch.distributed") and not rule.distributed:
        return False
    return rule.third_party is None or package in rule.third_party


def may_distribute(module: str) -> bool:
    keys = [prefix for prefix in TABLE if under(module, prefix)]
    return bool(keys) and TABLE[max(keys, key=len)].distributed


class TestImports:
    def test_table(self):
        files = sources("vidit", "parallel", "launch", "configs", "cluster")
        assert len(files) > 50
        assert [str(found) for path in files for found in imports(path) if not allowed(found)] == []

    def test_every_package_has_a_rule(self):
        names = {module_name(p) for p in sources("vidit", "parallel", "launch", "configs", "cluster")}
        assert [n for n in names if n != "vidit" and not any(under(n, prefix) for prefix in TABLE)] == []
        assert (ROOT / "vidit/__init__.py").read_text().count("import") == 0

    @pytest.mark.parametrize(
        ("file", "line"),
        [
            ("vidit/config/data.py", "import torch"),
            ("vidit/config/data.py", "from vidit import keys"),
            ("vidit/config/data.py", "from vidit.resolve import resolve"),
            ("vidit/overrides.py", "import torch"),
            ("vidit/idle.py", "from vidit.resolve import resolve"),
            ("vidit/resolve.py", "from vidit.vae.stored import adopt_vae"),
            ("vidit/resolve.py", "import torch"),
            ("vidit/vae/stored.py", "from vidit.vae.autoencoder import CausalVae\nimport torch"),
            ("vidit/diffusion/paths.py", "from vidit.resolve import resolve"),
            ("vidit/model/dit.py", "import torch.distributed as dist"),
            ("vidit/model/dit.py", "from torch import distributed"),
            ("vidit/model/dit.py", "def f():\n    from parallel import checkpoint"),
            ("vidit/model/dit.py", "from vidit.vae.store import load_vae"),
            ("vidit/model/dit.py", "from ..train import loop"),
            ("vidit/diffusion/paths.py", "from vidit.model.dit import DiT"),
            ("vidit/data/loader.py", "from vidit.text.bytes import ByteTextEncoder"),
            ("vidit/train/run.py", "import launch"),
            ("vidit/train/run.py", "from configs.demo import demo"),
            ("vidit/describe.py", "from vidit.model.dit import DiT"),
            ("vidit/describe.py", "import torch"),
            ("parallel/checkpoint.py", "import vidit.keys"),
            ("parallel/checkpoint.py", "from launch import job"),
            ("configs/demo.py", "from vidit.model import flops"),
            ("configs/demo.py", "import torch"),
            ("launch/__init__.py", "import torch"),
            ("launch/__init__.py", "from parallel import checkpoint"),
            ("cluster/health/disk.py", "import vidit.keys"),
            ("cluster/health/disk.py", "from cluster.slurm import local"),
            ("cluster/health/disk.py", "import pydantic"),
        ],
    )
    def test_the_table_refuses(self, file, line):
        assert [found for found in imports(ROOT / file, line) if not allowed(found)] != []

    @pytest.mark.parametrize(
        ("file", "line"),
        [
            ("vidit/model/dit.py", "from vidit.model.block import Block"),
            ("vidit/model/init.py", "from vidit import keys"),
            ("vidit/model/dit.py", "from . import block"),
            ("vidit/data/loader.py", "from vidit.text.encoder import TextTokens"),
            ("vidit/train/run.py", "from parallel import checkpoint"),
            ("vidit/train/run.py", "import vidit"),
            ("parallel/checkpoint.py", "import torch.distributed.checkpoint"),
            ("launch/__init__.py", "import parallel.planner"),
            ("cluster/health/disk.py", "import torch.distributed"),
        ],
    )
    def test_the_table_accepts(self, file, line):
        assert all(allowed(found) for found in imports(ROOT / file, line))

    def test_cli_imports_at_the_top_no_more_than_what_parses_a_config(self):
        tops = {f.target for f in imports(ROOT / "vidit/cli.py") if f.top and f.target.split(".")[0] in PACKAGES}
        assert tops == {"vidit.config", "vidit.config_source", "vidit.options"}

    def test_torch_distributed_is_named_only_where_it_may_be_imported(self):
        """`torch.distributed.get_rank()` needs no import line of its own."""
        found = [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for path in sources("vidit", "launch", "configs")
            if not may_distribute(module_name(path))
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        ]
        assert found == []

    def test_model_and_layout_meet_in_one_file(self):
        """`vidit/train/parallelize.py` alone knows both; the others may use parallel's checkpoints."""
        other = ("parallel.mesh", "parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.zero")
        found = [
            str(i)
            for path in sources("vidit")
            if path.name not in ("parallelize.py", "cli.py")
            for i in imports(path)
            if any(under(i.target, p) for p in other)
        ]
        assert [line for line in found if "vidit.model" in line] == []


def test_top_level_folders():
    """Fixed: a new one needs a decision."""
    there = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    extra = {n for n in there - FOLDERS - IGNORED if not n.endswith(".egg-info")}
    assert extra == set()
    assert FOLDERS - {"docs"} <= there  # git keeps no empty folder


IMPORT_EVERYTHING = """
import importlib, json, os, socket, subprocess, sys, threading
import torch

def refuse(*_, **__):
    raise AssertionError("an import asked for the network or a process")

start, popen = threading.active_count(), subprocess.Popen.__init__
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
subprocess.Popen.__init__ = os.fork = os.system = refuse
before, folder = dict(os.environ), os.listdir(".")
generator, dtype = torch.get_rng_state(), torch.get_default_dtype()
missing = []
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in ("deepspeed", "megatron", "ray", "flash_attn", "diffusers", "onnx"):
            raise
assert not (torch.distributed.is_available() and torch.distributed.is_initialized()), "a process group"
assert threading.active_count() == start, threading.enumerate()
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert torch.equal(torch.get_rng_state(), generator) and torch.get_default_dtype() == dtype
assert os.listdir(".") == folder, "files were written"
import multiprocessing
assert not multiprocessing.active_children()
changed = {k for k in os.environ if os.environ[k] != before.get(k)}
assert changed <= {"TORCHINDUCTOR_CACHE_DIR"}, changed  # torch's own, with torch.distributed.pipelining
print("done", file=sys.stderr)
"""


# torch itself as if built without torch.distributed, after whatever else needs it has been imported.
WITHOUT_DISTRIBUTED = """
import importlib, json, sys
import av, einops, PIL.Image, safetensors.torch, torch, torch.utils.checkpoint, torch.utils.data

for name in [n for n in sys.modules if n.split(".")[:2] == ["torch", "distributed"]]:
    sys.modules[name] = None
del torch.distributed
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
try:
    importlib.import_module("parallel.checkpoint")
except ImportError:
    print("done")
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def module_list(*packages: str) -> list[str]:
    return [module_name(p) for p in sources(*packages) if p.name != "__main__.py"]


class TestImporting:
    def test_it_does_nothing(self, tmp_path):
        """No process group, thread, process, network, file, print, environment or seed: one process imports it all."""
        names = module_list("vidit", "parallel", "launch", "configs", "cluster")
        done = subprocess.run(
            [sys.executable, "-c", IMPORT_EVERYTHING, json.dumps(names)],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert done.stderr.strip() == "done"

    def test_one_device_needs_no_torch_distributed(self, tmp_path):
        names = [n for n in module_list("vidit", "launch", "configs") if n != "vidit" and not may_distribute(n)]
        assert len(names) > 40
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_DISTRIBUTED, json.dumps(names)],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == "done\n", "parallel.checkpoint does need it, so the stub works"

    def test_login_node_packages_bring_no_torch(self, tmp_path):
        names = [*module_list("launch", "configs"), "vidit.config", "vidit.cli", "vidit.resolve", "vidit.describe"]
        names += ["vidit.train.layout"]
        if (ROOT / "parallel/planner.py").exists():
            names.append("parallel.planner")
        code = (
            f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
            "assert not {'torch', 'ray'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


ALONE = '''"""Stands at the root of the copy: the deleted packages cannot be found, wherever else they are installed."""

import sys
from pathlib import Path

import pytest

HERE, GONE = Path(__file__).parent, {gone!r}
PASSED = []


class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"{{name}} is deleted here", name=name)


sys.meta_path.insert(0, Gone())


@pytest.hookimpl(trylast=True)  # behind -k
def pytest_collection_modifyitems(config, items):
    """One case of every function: the others need no other package, and are run in place."""
    first = {{}}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = first.values()


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        PASSED.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    import vidit

    assert Path(vidit.__file__).is_relative_to(HERE), vidit.__file__
    loaded = [n for n, m in sys.modules.items() if n.startswith("vidit") and getattr(m, "__file__", None)]
    assert len(loaded) > 20
    assert all(Path(sys.modules[n].__file__).is_relative_to(HERE) for n in loaded)
    assert not [n for n in sys.modules if n.split(".")[0] in GONE]
    (HERE / "passed").write_text("\\n".join(PASSED))
'''
# The slowest, by file and by name: what they check is checked in place, and needs no second time.
SLOW_FILES = ("curation/*", "test_pack*", "test_staging*", "test_tr*", "test_s3*", "test_st[or]*", "test_columns*")
SLOW = "workers or held_out or vocabulary or attribute or motions or collide or Awkward or awkward or things_stay"
SLOW += " or window_core or TestWindowCore or test_partition or test_mask_marks or test_merge"
SLOW += " or flops or TestFlops or TestStrides or process or spawn or catalogue or mid_run or mirrored or thousand"


def test_one_device_needs_only_vidit(tmp_path):
    """With parallel, launch, cluster, configs and benchmarks deleted, the unit tests of the model, the diffusion,
    the VAE and the data still pass: the acceptance of the architecture."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("vidit", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "conftest.py").write_text(ALONE.format(gone=ABSENT_IN_THE_COPY))
    suites = [f"tests/unit/{name}" for name in ("model", "diffusion", "vae", "data")]
    suites += [f"--ignore-glob=*/data/{name}" for name in SLOW_FILES]
    clips = os.environ.get("VIDIT_TEST_CLIPS") or str(ROOT.parent / "shared/clips")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *suites, "-x", "-q", "-p", "no:cacheprovider", "-k", f"not ({SLOW})"],
        cwd=copy, env=environment(PYTHONPATH=str(copy), VIDIT_TEST_CLIPS=clips), capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = (copy / "passed").read_text().splitlines()
    assert len({name.partition("[")[0] for name in passed}) == len(passed) > 200, done.stdout[-500:]
    assert {Path(name).parts[2] for name in passed} == {"model", "diffusion", "vae", "data"}


class Call(NamedTuple):
    file: str
    line: int
    name: str
    keywords: dict[str, str]


def calls(*packages: str) -> Iterator[Call]:
    for path in sources(*packages):
        for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            keywords = {k.arg or "**": ast.unparse(k.value) for k in node.keywords}
            yield Call(str(path.relative_to(ROOT)), node.lineno, ast.unparse(node.func), keywords)


class TestBans:
    """What must not stand anywhere, with the reason in design.md 4 and 5."""

    def test_no_shell(self):
        bad = [c for c in calls(*PACKAGES) if c.keywords.get("shell", "False") != "False"]
        bad += [c for c in calls(*PACKAGES) if c.name in ("os.system", "os.popen", "subprocess.getoutput")]
        assert bad == []

    def test_nothing_is_unpickled(self):
        bad = [c for c in calls(*PACKAGES) if re.fullmatch(r"(c?[pP]ickle|dill|joblib|shelve)\.\w+", c.name)]
        bad += [c for c in calls(*PACKAGES) if c.name == "torch.load" and c.keywords.get("weights_only") != "True"]
        bad += [c for c in calls(*PACKAGES) if c.keywords.get("allow_pickle", "False") != "False"]
        bad += [c for c in calls(*PACKAGES) if c.keywords.get("trust_remote_code", "False") != "False"]
        assert bad == []
        modules = [i for p in sources(*PACKAGES) for i in imports(p) if i.target.split(".")[0] in ("pickle", "dill")]
        assert modules == []

    def test_nothing_is_extracted_or_evaluated(self):
        names = {"eval", "exec", "yaml.load", "yaml.unsafe_load"}
        bad = [c for c in calls(*PACKAGES) if c.name in names or c.name.rpartition(".")[2] in ("extractall", "extract")]
        assert bad == []

    def test_printing_is_for_the_command_line(self):
        """The library logs or returns; the command prints. A rich console writes progress and tables."""
        bad = [c for c in calls("vidit", "parallel", "launch", "configs") if c.name == "print"]
        assert [c for c in bad if c.file != "vidit/cli.py"] == []

    def test_the_environment_is_read_in_few_places(self):
        bad = []
        for path in sources("vidit", "parallel", "configs"):
            name = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
                    bad.append(f"{name}:{node.lineno}")
        allowed = ("parallel/mesh.py", "parallel/ranks.py", "vidit/train/precision.py")  # the last writes for cuBLAS
        assert [b for b in bad if not b.startswith(allowed)] == []

    def test_file_names(self):
        names = {"utils.py", "helpers.py", "common.py", "misc.py"}
        assert [str(p) for p in sources(*PACKAGES) if p.name in names] == []


def test_every_folder_of_tests_is_collected(request: pytest.FixtureRequest) -> None:
    """pytest passes over some names of folders without a word."""
    skipped = request.config.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert {Path("tests/dist"), Path("tests/unit/data")} <= folders
    assert [str(f) for f in folders if any(fnmatch(part, name) for part in f.parts for name in skipped)] == []
