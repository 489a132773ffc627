"""The laws of the house, read off the source: who may import whom, and what is nowhere to be found."""

from __future__ import annotations

import ast
import subprocess
import sys
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
PURE = [f"headwise.convert.{name}" for name in ("heads", "latent", "rope", "deepseek")] + ["headwise.eval.stats"]
# What a pure file may import from outside: mathematics, and the language's own types.
MATHEMATICS = {"torch", "math"}
TYPES = {"__future__", "collections", "dataclasses", "functools", "itertools", "typing"}
# Data flows down this list; a stage knows nothing of those below it. Only pipeline.py sees them all.
STAGES = [
    ["convert.checkpoint"],
    ["convert.architecture"],
    ["convert.calibration"],
    ["convert.heads", "convert.latent", "convert.rope"],
    ["convert.refit"],
    ["convert.deepseek"],
    ["convert.writer"],
    ["convert.layers"],
    ["convert.verify"],
    ["eval.perplexity", "eval.report"],
    ["convert.card"],
    ["publish"],
    ["convert.pipeline"],
    ["cli"],
]
LINES = 350
# A longer file, and why it is one thought.
LONG: dict[str, str] = {}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports(module: str, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Modules that `module` imports anywhere, functions included; the most specific name there is a file for."""
    found = set()
    for node in nodes or ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: the laws are checked on absolute ones"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else str(node.module))
    return found


def at_import_time(module: str) -> set[str]:
    return imports(module, _outside_functions(tree(module)))


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not typing_only:
            yield child
            yield from _outside_functions(child)


def reachable(module: str, edges: Callable[[str], set[str]]) -> set[str]:
    """Modules of the package that `module` leads to, itself left out unless it is on a cycle."""
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        new = {name for name in edges(ahead.pop()) if name in FILES} - seen
        seen |= new
        ahead += new
    return seen


def everything() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every file, with the module it is in."""
    return ((module, node) for module in FILES for node in ast.walk(tree(module)))


def calls(module: str, *names: str) -> list[ast.Call]:
    """Calls of functions by their written name, such as "print" or "torch.load"."""
    found = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func) in names]


@pytest.mark.parametrize("module", PURE)
def test_pure_files_import_mathematics_only(module: str) -> None:
    for name in {module} | reachable(module, imports):
        foreign = {n for n in imports(name) if n.split(".")[0] not in MATHEMATICS | TYPES | {"headwise"}}
        assert not foreign, f"{name} is pure and imports {foreign}"
        assert not calls(name, "open", "print", "torch.load", "torch.save"), f"{name} is pure and does I/O"


def test_pure_files_know_no_other_part() -> None:
    impure = {f"headwise.{name}" for stage in STAGES for name in stage} - set(PURE) | {"headwise.errors"}
    for module in PURE:
        assert not reachable(module, imports) & impure


def test_data_flows_one_way() -> None:
    for place, stage in enumerate(STAGES):
        later = {f"headwise.{name}" for names in STAGES[place + 1 :] for name in names}
        for module in {f"headwise.{name}" for name in stage} & FILES.keys():
            assert not reachable(module, imports) & later, f"{module} reaches a later stage"


def test_nothing_imports_in_a_circle() -> None:
    circles = [module for module in FILES if module in reachable(module, at_import_time)]
    assert not circles


def test_nothing_imports_the_command() -> None:
    front = {"headwise.cli", "headwise._cli.options", "headwise._cli.app", "headwise.__main__"}
    assert not [m for m in FILES if m not in front and front & imports(m)]
    assert [m for m in FILES if "headwise.cli" in imports(m)] == ["headwise.__main__"]


def test_help_waits_for_no_heavy_import() -> None:
    probe = (
        "import sys, headwise.cli as c\n"
        "try: c.cli(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'yaml', 'huggingface_hub', 'matplotlib'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_output_sink() -> None:
    loud = ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write")
    assert not [f"{m}:{call.lineno}" for m in FILES if m != "headwise._cli.console" for call in calls(m, *loud)]
    drawers = [m for m in FILES if {name.split(".")[0] for name in imports(m)} & {"rich", "tqdm"}]
    assert drawers == ["headwise._cli.console"]


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


def test_no_code_from_a_checkpoint_runs() -> None:
    runners = ("eval", "exec", "os.system", "yaml.load", "pickle.load", "pickle.loads")
    assert not [f"{m}:{call.lineno}" for m in FILES for call in calls(m, *runners)]
    for module, node in everything():
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{module}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False", f"{module}:{node.value.lineno}"


def test_every_file_says_what_it_is() -> None:
    assert not [m for m in FILES if FILES[m].read_text(encoding="utf-8").strip() and not ast.get_docstring(tree(m))]


def test_files_stay_small() -> None:
    lengths = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in FILES.items()}
    assert {m: n for m, n in lengths.items() if n > LINES}.keys() == LONG.keys()


def test_every_row_of_the_table_has_a_tiny_model() -> None:
    from tests.tiny_models import CONFIGS

    table = yaml.safe_load((PACKAGE / "convert" / "architectures.yaml").read_text(encoding="utf-8"))
    inner = {wrapper["text_model_type"] for wrapper in table["wrappers"].values()}
    assert set(CONFIGS) | inner == set(table["rows"]) | set(table["wrappers"])


def test_every_kernel_has_its_reference() -> None:
    for kernel in PACKAGE.glob("kernels/*/triton.py"):
        assert (kernel.parent / "reference.py").is_file(), f"{kernel.parent.name} has no reference.py"
