"""The memory that is left: within control groups of both versions, and page cache not counted as used."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from headwise.environment import _group_memory, available_memory, versions


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_every_group_above_the_process_limits_it(tmp_path: Path) -> None:
    stat = "anon 1\ninactive_file 200\n"
    write_group(tmp_path / "a" / "b", memory__max="1000\n", memory__current="700\n", memory__stat=stat)
    write_group(tmp_path / "a", memory__max="max\n", memory__current="700\n", memory__stat=stat)
    write_group(tmp_path, memory__max="5000\n", memory__current="700\n", memory__stat=stat)
    assert list(_group_memory("0::/a/b\n", tmp_path)) == [500, 4500]


def test_a_path_of_the_host_leads_to_the_group_at_the_top(tmp_path: Path) -> None:
    write_group(
        tmp_path / "memory",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="400",
        memory__stat="total_inactive_file 50",
    )
    assert list(_group_memory("4:memory:/docker/0123\n1:cpu:/\n", tmp_path)) == [650]


def test_no_group_is_no_limit(tmp_path: Path) -> None:
    assert list(_group_memory("0::/\n1:cpu:/\n", tmp_path)) == []


def test_the_cpu_has_memory_and_other_devices_do_not_report_it() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is not None and 0 < free <= psutil.virtual_memory().total
    assert available_memory(torch.device("meta")) is None


def test_versions_name_what_is_installed() -> None:
    assert {"python", "torch"} == set(versions(["torch", "no-such-package"]))
