"""Tests of the files around the package: version, dependency bounds, workflows and changelog agree."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import headwise

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def release() -> ModuleType:
    """The release script."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_installed_version_is_the_packages() -> None:
    assert version("headwise") == headwise.__version__


def test_the_lowest_pins_are_the_lower_bounds_of_the_package() -> None:
    bounds = {}
    for requirement in requires("headwise") or []:
        if found := re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", requirement):
            bounds[found[1].lower().replace("-", "_")] = found[2]
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins
    for name, pin in pins.items():
        assert pin == bounds[name] or pin.startswith(f"{bounds[name]}."), name


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_of_a_workflow_is_a_make_target(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs: dict[str, Any] = yaml.safe_load(workflow.read_text())["jobs"]
    commands = 0
    for job in jobs.values():
        for step in job["steps"]:
            if "run" not in step:
                continue
            commands += 1
            program, target, *_ = step["run"].split()
            named = job["strategy"]["matrix"]["target"] if target == "${{" else [target]
            assert program == "make" and set(named) <= targets, step["run"]
    assert commands


def test_a_release_has_dated_notes(release: ModuleType) -> None:
    changelog = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n\n### Added\n- New.\n\n"
    changelog += "## [1.1.0] - 2026-01-01\n\n- Old.\n"
    assert release.notes_of(changelog, "1.2.0") == "### Added\n- New.\n"
    assert release.notes_of(changelog, "1.1.0") == "- Old.\n"
    for missing in ("1.3.0", "1.2", "Unreleased"):
        with pytest.raises(ValueError, match=re.escape(missing)):
            release.notes_of(changelog, missing)


def test_a_tag_of_another_version_is_no_release(release: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main("v999.0.0") == 1
    assert headwise.__version__ in capsys.readouterr().err


def test_the_changelog_has_room_for_the_next_release() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])
