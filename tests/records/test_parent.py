"""The parent of a converted folder is found again."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from headwise.convert.pipeline import convert_model
from headwise.records.manifest import read_record
from headwise.records.parent import PARENT, read_parent_path, recorded_source
from headwise.records.push import files_to_push
from tests.convert.speaking import save_speaking


def test_the_path_of_the_parent_is_kept_and_not_published(tmp_path: Path) -> None:
    parent = save_speaking(tmp_path / "far" / "away")
    out, text = tmp_path / "out", shutil.copy(argparse.__file__, tmp_path / "text.txt")
    convert_model(parent, out, to="mqa", calibrate=str(text), calibration_tokens=256, refit="off")
    record = read_record(out)
    assert read_parent_path(out) == parent and recorded_source(record, out) == parent
    assert PARENT not in files_to_push(out)
    for name in files_to_push(out):
        assert str(tmp_path).encode() not in (out / name).read_bytes(), f"{name} names a folder of the user"
    assert record is not None and record["arguments"]["calibration"]["text"] == "text.txt"
    (parent / "model.safetensors").rename(parent / "other.safetensors")
    assert recorded_source(record, out) is None
    (out / PARENT).write_text("x\0y")
    assert read_parent_path(out) is None
