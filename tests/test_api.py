"""The verbs as functions of the package."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import headwise

VERBS = [name for name in headwise.__all__ if name.endswith("_model") or name == "update_card"]


@pytest.mark.parametrize("name", headwise.__all__)
def test_every_public_name_loads_twice(name: str) -> None:
    first, second = getattr(headwise, name), getattr(headwise, name)
    assert first is not None and first is second
    assert name in dir(headwise)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_real_signature_and_a_docstring(name: str) -> None:
    verb = getattr(headwise, name)
    signature = inspect.signature(verb)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert signature.return_annotation is not inspect.Signature.empty
    assert "Args:" in (verb.__doc__ or "")


def test_no_module_is_callable() -> None:
    import headwise.convert

    assert not callable(headwise.convert)


USER = """
from pathlib import Path
import headwise

reveal = headwise.inspect_model("folder")
headwise.convert_model("folder", Path("out"), to="gqa", groups="four")
headwise.convert_model("folder", Path("out"), too="gqa")
headwise.no_such_verb
"""


def test_type_checkers_see_wrong_arguments(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "user.py"
    program.write_text(USER)
    # To read the sources of the libraries takes most of a minute, and no signature of ours needs them.
    libraries = ("torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "datasets", "tokenizers")
    skipped = [f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in libraries]
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\nignore_missing_imports = True\n" + "".join(skipped))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(headwise.__file__).parents[1])},
    )
    wrong = [line.split(":")[1] for line in done.stdout.splitlines() if "user.py" in line and "error" in line]
    assert wrong == ["6", "7", "8"], done.stdout
