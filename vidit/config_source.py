"""A config by its name: the function that returns it is found and called, overrides are applied, faults are named.

No torch: a login node does this too.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from vidit.config import ConfigError, RunConfig
from vidit.overrides import apply_overrides, faults_of

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """`configs.demo`, `configs.demo:vae` or `path/to/file.py:function` with overrides applied.

    The function defaults to the module's last name. ValueError where module or function is not there or fails,
    ConfigError with every fault of the config itself.
    """
    module_name, _, function = name.partition(":")
    module = _load_module(module_name)
    function = function or module.__name__.rpartition(".")[2]
    build = getattr(module, function, None)
    if not callable(build):
        raise ValueError(f"{module_name} has no config {function!r}; {_what_is_there(module)}")
    with _errors_named(name):
        config = build()
    if not isinstance(config, RunConfig):
        raise ValueError(f"{name} returns {type(config).__name__}, not a RunConfig")
    try:
        return apply_overrides(config, overrides)
    except ConfigError as error:
        raise ConfigError([*error.faults, *_other_faults(config, overrides)]) from error


def _load_module(name: str) -> ModuleType:
    """The module of a config: a file by its path, anything else by its dotted name."""
    if name.endswith(".py") or not DOTTED.fullmatch(name):
        path = Path(name)
        if path.suffix != ".py" or not path.is_file():
            near = path.parent / f"{path.name}.py"
            cure = f"give {near}" if near.is_file() else "give a path that ends in .py, or a module like configs.demo"
            raise ValueError(f"no config file {path}; {cure}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with _errors_named(name):
            spec.loader.exec_module(module)
        return module
    with _errors_named(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError([f"no config module {name} ({error}); the shipped ones are configs.*"]) from error
            raise


def _what_is_there(module: ModuleType) -> str:
    """What to name instead: the functions of a module, the modules of a package."""
    functions = [
        n for n, f in vars(module).items()
        if not n.startswith("_") and inspect.isfunction(f) and f.__module__ == module.__name__
    ]  # fmt: skip
    if functions:
        return f"it has {', '.join(functions)}"
    modules = [f"{module.__name__}.{m.name}" for m in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return f"it is a package; name one of {', '.join(modules)}" if modules else "it defines no function"


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Errors of a config's own source as one line that names it; wrong fields of a section as faults."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError(faults_of(error)) from error
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ValueError(f"config {name}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        # The last place outside Python's own import machinery, which is where the config went wrong.
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
        where = f"{frames[-1].filename}, line {frames[-1].lineno}"
        raise ValueError(f"config {name}: {type(error).__name__}: {error} ({where})") from error


def _other_faults(config: RunConfig, overrides: Sequence[str]) -> Sequence[str]:
    """What is wrong with a config apart from the overrides that do not parse."""
    from vidit.resolve import resolve
    from vidit.vae.stored import adopt_vae

    for text in overrides:
        with suppress(ConfigError):
            config = apply_overrides(config, [text])
    try:
        resolve(adopt_vae(config))
    except ConfigError as error:
        return error.faults
    return ()
