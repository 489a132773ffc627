"""Architecture tests, read off the sources: import order, folder and file sizes, forbidden calls, file headers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import headwise

PACKAGE = Path(headwise.__file__).parent
FILES = {
    ".".join(("headwise", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A package imports only from packages above it (docs/architecture.md).
ORDER = (
    *("errors", "progress", "environment", "cuda", "format", "fields", "schema", "registry", "compat"),
    *(
        "io",
        "pictures",
        "models",
        "text",
        "records",
        "kernels",
        "serving",
        "measure",
        "train",
        "convert",
        "eval",
        "recipes",
    ),
    *("demo", "_cli", "cli", "__main__"),
)
# The root modules know each other only in this order as well; every other module is in a folder.
ROLES = {"__init__", "settings", "target", "reference", "triton"}
MODULES_IN_A_FOLDER = 12
LINES = 500
# Pure mathematics, and what it may import.
PURE = (
    "convert.linalg",
    "convert.gqa",
    "convert.mla",
    "convert.positions",
    "convert.sparse",
    "eval.stats",
    "models.rope",
    "train.losses",
)
IMPURE = {
    *("convert.gqa.target", "convert.mla.size_choice", "convert.mla.target"),
    *("convert.positions.context", "convert.positions.moved", "convert.positions.rope_range"),
    *("convert.positions.windows", "convert.positions.window_choice"),
    *("convert.sparse.budget", "convert.sparse.sharing", "convert.sparse.target", "convert.sparse.warm_up"),
}
MATHEMATICS = {"torch", "math", "scipy", "statsmodels", "numpy"}
TYPES = {"__future__", "collections", "concurrent", "dataclasses", "functools", "importlib", "itertools", "typing"}
FOUNDATION = {"headwise.errors", "headwise.registry", "headwise.models.layout", "headwise.models.rope"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@cache
def nodes(module: str) -> list[ast.AST]:
    return list(ast.walk(tree(module)))


@cache
def imports(module: str) -> set[str]:
    """Return the modules that `module` imports anywhere, functions and type checking included."""
    names = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: the laws are checked on absolute ones"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in FILES else str(node.module))
    return names


def package_of(module: str) -> str:
    return module.split(".")[1]


def reachable(module: str, edges: Callable[[str], set[str]]) -> set[str]:
    """Return the modules of the package that `module` leads to; itself only if it is on a circle."""
    found: set[str] = set()
    ahead = [module]
    while ahead:
        new = {name for name in edges(ahead.pop()) if name in FILES} - found
        found |= new
        ahead += new
    return found


def everything() -> Iterator[tuple[str, ast.AST]]:
    """Yield every node of every file, with the module it is in."""
    return ((module, node) for module in FILES for node in nodes(module))


def calls(module: str, *names: str) -> list[ast.Call]:
    """Return the calls of functions by their written name, such as "print" or "torch.load"."""
    found = [node for node in nodes(module) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func) in names]


def test_every_package_has_a_place_in_the_order() -> None:
    assert {package_of(module) for module in FILES if module != "headwise"} == set(ORDER)


def test_a_package_imports_only_from_packages_above_it() -> None:
    back = [
        f"{module} -> {name}"
        for module in FILES
        if module != "headwise"
        for name in imports(module)
        if name.startswith("headwise.") and ORDER.index(package_of(name)) > ORDER.index(package_of(module))
    ]
    assert not back


def test_nothing_imports_in_a_circle() -> None:
    assert not [module for module in FILES if module != "headwise" and module in reachable(module, imports)]


def test_a_folder_is_read_at_a_glance() -> None:
    counts: dict[Path, int] = defaultdict(int)
    for path in FILES.values():
        counts[path.parent] += path.name != "__init__.py"
    wide = {str(f.relative_to(PACKAGE)): n for f, n in counts.items() if n > MODULES_IN_A_FOLDER and f != PACKAGE}
    assert not wide


def test_a_file_name_occurs_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for module, path in FILES.items():
        places[path.stem].append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1 and name not in ROLES}


def test_a_public_name_is_defined_once() -> None:
    """Kernels and their references share a signature on purpose."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in FILES:
        if package_of(f"{module}.x") == "kernels":
            continue
        for node in tree(module).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_files_stay_readable() -> None:
    lengths = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in FILES.items()}
    assert not {m: n for m, n in lengths.items() if n > LINES}


def test_tests_mirror_the_package() -> None:
    """A test file of a folder that the package has too is named after a module there."""
    tests = Path(__file__).parent
    strays = []
    for path in tests.rglob("test_*.py"):
        folder = path.parent.relative_to(tests)
        if folder == Path() or not (PACKAGE / folder).is_dir():
            continue
        if not (PACKAGE / folder / path.name.removeprefix("test_")).exists():
            strays.append(str(path.relative_to(tests)))
    assert not strays


def pure_modules() -> list[str]:
    names = tuple(f"headwise.{name}" for name in PURE)
    inside = tuple(f"{name}." for name in names)
    return [m for m in FILES if (m in names or m.startswith(inside)) and m.removeprefix("headwise.") not in IMPURE]


@pytest.mark.parametrize("module", pure_modules())
def test_pure_files_import_mathematics_only(module: str) -> None:
    for name in imports(module):
        if name.startswith("headwise"):
            assert name in FOUNDATION or name in pure_modules(), f"{module} is pure and imports {name}"
        else:
            assert name.split(".")[0] in MATHEMATICS | TYPES, f"{module} is pure and imports {name}"
    assert not calls(module, "open", "print", "torch.load", "torch.save"), f"{module} is pure and does I/O"


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"], ["eval", "--help"], ["uptrain", "--help"]])
def test_help_waits_for_no_heavy_import(words: list[str]) -> None:
    probe = (
        "import sys, headwise.cli as c\n"
        f"try: c.cli({words})\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'yaml', 'huggingface_hub', 'matplotlib', 'scipy'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_option_waits_for_no_heavy_import() -> None:
    probe = (
        "import sys, headwise.cli as c\n"
        "try: c.main()\n"
        "except SystemExit as e: assert e.code == 2\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'matplotlib', 'scipy'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    words = ["convert", "model", "out", "--to", "gqa", "--groups", "2", "--method", "optimum"]
    done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_output_sink() -> None:
    sink = "headwise._cli.console"
    writers = ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write")
    assert not [f"{m}:{call.lineno}" for m in FILES if m != sink for call in calls(m, *writers)]
    assert [m for m in FILES if "rich" in {name.split(".")[0] for name in imports(m)}] == [sink]


def test_files_are_written_through_io_only() -> None:
    """`io` refuses links in place of files; a library's own writer gets its path from `write_file_atomically`."""
    sinks, no_files = {"headwise.io.fs", "headwise.io.workdir", "headwise.io.writer"}, {"os.devnull", "buffer"}
    wrong = []
    for module in FILES.keys() - sinks:
        called = [node for node in nodes(module) if isinstance(node, ast.Call)]
        given = [n for call in called if _name_of(call) == "write_file_atomically" for n in ast.walk(call)]
        names = {node.id for node in given if isinstance(node, ast.Name)}
        writers = [node for node in nodes(module) if isinstance(node, ast.FunctionDef) and node.name in names]
        allowed = {id(node) for node in [*given, *(n for writer in writers for n in ast.walk(writer))]}
        wrong += [
            f"{module}:{call.lineno}: {ast.unparse(call)}"
            for call in called
            if id(call) not in allowed and _writes_a_file(call) and not no_files & set(map(ast.unparse, call.args))
        ]
    assert not wrong


def _name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _writes_a_file(call: ast.Call) -> bool:
    if _name_of(call) in ("copyfile", "savefig", "save_file", "symlink_to", "touch", "write_bytes", "write_text"):
        return True
    whole = (
        "os.open",
        "json.dump",
        "yaml.dump",
        "torch.save",
        "np.save",
        "np.lib.format.open_memmap",
        "shutil.copy",
    )
    if _name_of(call) != "open":
        return ast.unparse(call.func) in whole
    mode = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [str(node.value) for node in mode if isinstance(node, ast.Constant)]
    return ast.unparse(call.func) in whole or any(re.fullmatch(r"[rbt+]*[wax+][wbt+]*", mode) for mode in modes)


def test_the_library_names_no_flags() -> None:
    """Messages name fields in backquotes; the command line puts its flags in their place."""
    flags = {
        f"--{name.replace('_', '-')}"
        for command in _commands()
        for name in (p.name for p in command.params)
        if name and len(name) > 2
    }
    wrong = []
    for module in FILES:
        if package_of(f"{module}.x") in ("_cli", "cli", "__main__"):
            continue
        documentation = {id(node) for node in _docstrings(tree(module))}
        for node in nodes(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value)) & flags
                wrong += [f"{module}:{node.lineno}: {flag}" for flag in found if not _is_command(node.value)]
    assert not wrong


def _commands() -> list:
    from headwise.cli import cli

    return [command for command in cli.commands.values() if command.params]


def _docstrings(module: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            assert isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            yield node.body[0].value


def _is_command(text: str) -> bool:
    """A text that is a flag alone, or a whole command line."""
    return (
        re.fullmatch(r"--[a-z-]+", text) is not None
        or re.search(r"\b(headwise|accelerate|llama-quantize) ", text) is not None
    )


def test_a_model_type_is_a_row_and_never_a_branch() -> None:
    branches = []
    for module, node in everything():
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asked = any("model_type" in ast.unparse(side) for side in sides if not _literal(side))
            if asked and any(map(_literal, sides)):
                branches.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Match) and "model_type" in ast.unparse(node.subject):
            branches.append(f"{module}:{node.lineno}")
    assert not branches


def _literal(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return all(map(_literal, node.elts))
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != "model_type"


def test_no_model_type_stands_in_code() -> None:
    """Dictionaries by model type belong in architectures.yaml."""
    table = yaml.safe_load((PACKAGE / "models" / "architectures.yaml").read_text(encoding="utf-8"))
    types = set(table["rows"]) | set(table["wrappers"])
    wrong = [
        f"{module}:{node.lineno}"
        for module, node in everything()
        if isinstance(node, ast.Dict)
        and len({key.value for key in node.keys if isinstance(key, ast.Constant)} & types) > 0
    ]
    assert not wrong


def test_nothing_asks_for_the_kind_of_architecture() -> None:
    kinds = {"Architecture", "LatentModel"}
    asked = [
        f"{m}:{call.lineno}"
        for m in FILES
        for call in calls(m, "isinstance")
        if kinds & set(re.findall(r"\w+", ast.unparse(call)))
    ]
    assert not asked


def test_no_code_from_a_checkpoint_runs() -> None:
    runners = ("eval", "exec", "os.system", "yaml.load", "pickle.load", "pickle.loads")
    assert not [f"{m}:{call.lineno}" for m in FILES for call in calls(m, *runners)]
    for module, node in everything():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{module}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False", f"{module}:{node.value.lineno}"


def test_every_file_has_a_docstring() -> None:
    assert not [m for m in FILES if FILES[m].read_text(encoding="utf-8").strip() and not ast.get_docstring(tree(m))]


def test_every_row_of_the_table_has_a_tiny_model() -> None:
    from tests.tiny_models import CONFIGS, OTHERS

    table = yaml.safe_load((PACKAGE / "models" / "architectures.yaml").read_text(encoding="utf-8"))
    inner = {wrapper["text_model_type"] for wrapper in table["wrappers"].values()}
    rows = set(table["rows"]) | set(table["wrappers"]) | set(table["composites"])
    assert set(CONFIGS) | set(OTHERS) | inner == rows


def test_every_kernel_has_a_reference_of_the_same_signature() -> None:
    for kernel in PACKAGE.glob("kernels/*/triton.py"):
        name = kernel.parent.name
        both = [ast.parse((kernel.parent / f"{side}.py").read_text()) for side in ("triton", "reference")]
        found = [
            next(n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == name) for module in both
        ]
        assert ast.unparse(found[0].args) == ast.unparse(found[1].args), name


def test_every_method_of_the_registry_loads() -> None:
    from headwise.registry import METHODS

    assert len({(method.kind, method.name) for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert callable(method.load()), method
