"""Every option of a config is read by the code that it steers: an option that nobody reads is a promise broken.

A name alone proves nothing, for a patch size is a field of the VAE and of the model, and an attribute of many
modules besides. So each `x.field` counts only where the type of `x` is known from annotations: of parameters and
attributes, and of what is assigned from them. A read that cannot be traced so is reported as missing.
"""

import ast
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from vidit import config

ROOT = Path(__file__).parents[1]
# They check and print options; what is read nowhere else steers nothing.
RULES = {f"vidit/{name}.py" for name in ("config", "overrides", "resolve", "idle", "describe")}
SAME_TYPE = {"model_copy", "model_validate", "model_validate_json", "preset"}
ENTRIES = {"Bucket", "Given", "Source"}  # of lists that are empty by default: what makes one up is given
SEQUENCES = {"tuple", "list", "Sequence", "Iterable"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Env = dict[str, str]


def sections() -> dict[str, type[config.Section]]:
    found = [c for c in vars(config).values() if isinstance(c, type) and issubclass(c, config.Section)]
    return {c.__name__: c for c in found if c is not config.Section}


def held(annotation: object) -> str:
    """The name of a field's type; of a tuple of one type, "[X]"."""
    first = next(iter(typing.get_args(annotation)), None)
    if typing.get_origin(annotation) is tuple and isinstance(first, type):
        return f"[{first.__name__}]"
    return getattr(annotation, "__name__", "")


class Reads:
    """(section, field) -> files that read it."""

    def __init__(self, sources: dict[str, str]):
        self.found: dict[tuple[str, str], set[str]] = {}
        self.trees = {file: ast.parse(text) for file, text in sources.items()}
        nodes = [n for tree in self.trees.values() for n in ast.walk(tree)]
        self.attributes: dict[str, Env] = {n.name: {} for n in nodes if isinstance(n, ast.ClassDef)}
        for name, section in sections().items():
            types = {f: held(info.annotation) for f, info in section.model_fields.items()}
            types |= {f: self.named(code.returns) for f, code in properties(name).items()}
            self.attributes[name] = {f: t for f, t in types.items() if t.strip("[]") in sections()}
        self.returns = {n.name: t for n in nodes if isinstance(n, Function) and (t := self.named(n.returns))}
        for _ in range(4):  # the attributes of one class may be typed by those of another, read later
            for file, tree in self.trees.items():
                self.body(tree, {}, "", file)

    def named(self, annotation: ast.expr | None) -> str:
        """The class of an annotation; of `X | None`, X; of a sequence of X, "[X]"."""
        if isinstance(annotation, ast.BinOp):
            return self.named(annotation.left) or self.named(annotation.right)
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            return self.named(ast.parse(annotation.value, mode="eval").body)
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in SEQUENCES:
            first = annotation.slice.elts[0] if isinstance(annotation.slice, ast.Tuple) else annotation.slice
            return f"[{one}]" if (one := self.named(first)) else ""
        return annotation.id if isinstance(annotation, ast.Name) and annotation.id in self.attributes else ""

    def each(self, target: ast.expr, items: ast.expr, env: Env) -> None:
        """Bind what a loop over `items` takes, of zip and enumerate too."""
        if isinstance(items, ast.Call) and isinstance(items.func, ast.Name) and isinstance(target, ast.Tuple):
            given = {"zip": items.args, "enumerate": [ast.Constant(0), *items.args[:1]]}.get(items.func.id, [])
            for one, its in zip(target.elts, given, strict=False):
                self.each(one, its, env)
        elif isinstance(target, ast.Name):
            kind = self.type_of(items, env)
            env[target.id] = kind[1:-1] if kind.startswith("[") else ""

    def type_of(self, node: ast.expr, env: Env) -> str:
        if isinstance(node, ast.Name):
            return env.get(node.id, "") or (node.id if node.id in sections() else "")
        if isinstance(node, ast.Attribute):
            return self.attributes.get(self.type_of(node.value, env), {}).get(node.attr, "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id if node.func.id in self.attributes else self.returns.get(node.func.id, "")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SAME_TYPE:
            return self.type_of(node.func.value, env)
        return ""

    def body(self, scope: ast.AST, env: Env, inside: str, file: str) -> None:
        """Walk one scope; functions within see its names, a method's `self` is of the class `inside`."""
        for node in own_nodes(scope):
            if isinstance(node, ast.ClassDef):
                self.body(node, env, node.name, file)
            elif isinstance(node, Function):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                typed = {a.arg: self.named(a.annotation) for a in arguments}
                if inside and isinstance(scope, ast.ClassDef) and arguments:
                    typed[arguments[0].arg] = inside
                self.body(node, {**env, **typed}, inside, file)
            elif isinstance(node, ast.For | ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
                for loop in [node] if isinstance(node, ast.For) else node.generators:
                    self.each(loop.target, loop.iter, env)
            elif isinstance(node, ast.AnnAssign) and isinstance(scope, ast.ClassDef) and scope.name not in sections():
                self.attributes[inside][ast.unparse(node.target)] = self.named(node.annotation)
            elif isinstance(node, ast.AnnAssign) and node.value:
                self.bind(node.target, node.value, env)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self.bind(target, node.value, env)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = self.type_of(node.value, env)
                if owner in sections():
                    self.found.setdefault((owner, node.attr), set()).add(file)

    def bind(self, target: ast.expr, value: ast.expr, env: Env) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self.bind(one, its, env)
        elif isinstance(target, ast.Name):
            env[target.id] = self.type_of(value, env)
        elif isinstance(target, ast.Attribute) and (owner := self.type_of(target.value, env)):
            self.attributes[owner][target.attr] = self.type_of(value, env)

    def of(self, section: str, field: str) -> set[str]:
        """Files that read a field, itself or through a property of its section that they read."""
        files = self.found.get((section, field), set()) - RULES
        for name, code in properties(section).items():
            if field in {n.attr for n in ast.walk(code) if isinstance(n, ast.Attribute)}:
                files |= self.found.get((section, name), set()) - RULES
        return files

    def unread(self, fields: dict[str, list[str]]) -> list[str]:
        return [f"{section}.{field}" for section, names in fields.items() for field in names
                if not self.of(section, field)]  # fmt: skip


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Everything in a scope in the order of the text, without what stands in functions and classes within."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, (Function, ast.ClassDef)):
            yield from own_nodes(child)


@cache
def properties(section: str) -> dict[str, ast.FunctionDef]:
    trees = (ast.parse(path.read_text()) for path in sorted((ROOT / "vidit/config").glob("*.py")))
    (body,) = (n.body for tree in trees for n in tree.body if isinstance(n, ast.ClassDef) and n.name == section)
    return {
        n.name: n
        for n in body
        if isinstance(n, ast.FunctionDef) and "property" in {ast.unparse(d) for d in n.decorator_list}
    }


@pytest.fixture(scope="module")
def reads() -> Reads:
    files = [path for package in ("vidit", "parallel", "launch") for path in sorted((ROOT / package).rglob("*.py"))]
    return Reads({str(path.relative_to(ROOT)): path.read_text() for path in files})


FIELDS = {name: list(section.model_fields) for name, section in sections().items()}


@pytest.mark.parametrize("section", FIELDS)
def test_every_field_is_read(section: str, reads: Reads) -> None:
    assert reads.unread({section: FIELDS[section]}) == []


@pytest.mark.parametrize(
    "planted",
    [
        ("Text", "patch"), ("Text", "height"), ("Data", "patch"), ("Data", "sampler"), ("Train", "patch"),
        ("Train", "weights"), ("Sample", "height"), ("Sample", "device"), ("Model", "path"), ("Vae", "num_heads"),
        ("Diffusion", "width"), ("RunConfig", "steps"), ("Train", "no_such_option"),
    ],
    ids=".".join,
)  # fmt: skip
def test_an_unread_field_is_found_whatever_else_bears_its_name(planted: tuple[str, str], reads: Reads) -> None:
    section, field = planted
    fields = FIELDS | {section: [*FIELDS[section], field]}
    assert reads.unread(fields) == [f"{section}.{field}"]


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ("def f(c: Text):\n    return c.width", "Text.width"),
        ("def f(config: RunConfig):\n    d, s = config.data, config.sample\n    return s.guidance", "Sample.guidance"),
        ("class A:\n    config: RunConfig\n    def f(self):\n        return self.config.vae.patch", "Vae.patch"),
        ("class A:\n    def __init__(self, c: Train):\n        self.c = c\n    def f(self):\n        return self.c.eps",
         "Train.eps"),
        ("class A:\n    c: 'Data | None'\ndef f(a: A):\n    def g():\n        return a.c.fps", "Data.fps"),
        ("def f(c: RunConfig):\n    m = c.model.model_copy(update={})\n    return m.qk_norm", "Model.qk_norm"),
        ("def g(x) -> RunConfig: ...\ndef f(x):\n    return g(x).train.seed", "Train.seed"),
        ("def f(c: RunConfig):\n    return c.directory", "RunConfig.run_dir"),
    ],
    ids=lambda value: value.partition("\n")[0],
)  # fmt: skip
def test_reads_are_traced(source: str, field: str) -> None:
    section, _, name = field.partition(".")
    assert Reads({"a.py": source}).of(section, name) == {"a.py"}
    assert not Reads({"vidit/resolve.py": source}).of(section, name), "a rule about an option does not use it"


@pytest.mark.parametrize("section", FIELDS)
def test_every_field_has_a_type_and_a_default(section: str) -> None:
    for name, field in sections()[section].model_fields.items():
        assert field.annotation is not None
        assert name == "name" or section in ENTRIES or not field.is_required()
