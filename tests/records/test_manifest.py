"""headwise.json: what it holds and what it leaves out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.records.manifest import changed_files, command_of, hash_files, make_manifest
from tests.convert.test_plan import model, plan_for

__all__ = ["model"]

LAYERS = {
    0: {"key_error": 0.1, "value_error": 0.5, "refit": {"before": 0.5, "after": 0.1, "steps": 30}},
    1: {"key_error": 0.4, "value_error": 0.2, "groups": [[0, 1]]},
}
PASSED = {"passed": True, "checks": [{"name": "logits", "passed": True, "detail": "equal to 1e-7"}]}


def record_of(model, layers=LAYERS, plan=None, **options):
    hashes = {"b": "22", "a": "11"}
    return make_manifest(
        plan or plan_for(model, 4),
        open_checkpoint(model),
        out="out",
        hashes=hashes,
        files={},
        layers=layers,
        device="cpu",
        **options,
    )


def test_record_holds_what_is_needed_to_repeat_the_conversion(model):
    record = record_of(model, verification=PASSED)
    assert json.loads(json.dumps(record)) == record
    assert list(record["sha256"]) == ["a", "b"] and record["layers"]["1"]["groups"] == [[0, 1]]
    assert record["source"]["files"].keys() == {path.name for path in model.glob("*.safetensors")}
    assert record["cache"]["before"]["bytes_per_token"] == 2 * record["cache"]["after"]["bytes_per_token"]
    assert str(model.parent) not in json.dumps(record), "where a user keeps files is not published"


def test_the_command_repeats_every_decision(model):
    plan = replace(plan_for(model, 4), model="org/name", revision="c0ffee")
    assert (
        command_of(plan, "a folder", PASSED)
        == "headwise convert org/name@c0ffee 'a folder' --to gqa --groups 4 --calibrate none"
    )
    measured = {"text": "builtin", "sequences": 8, "length": 512, "steps": 0, "seed": 3, "keep": None}
    arguments = {"to": "mla", "rank": 16, "pad_values": True, "calibration": measured, "seed": 3}
    assert command_of(replace(plan, arguments=arguments), "out", None) == (
        "headwise convert org/name@c0ffee out --to mla --rank 16 --pad-values --seed 3 "
        "--calibrate builtin --calibration-tokens 4096 --refit off --no-verify"
    )
    # An exact conversion has no refit; its text is that of the indexers.
    arguments = {"to": "mla", "exact": True, "sparse": "dsa", "calibration": measured | {"index_steps": 5}}
    assert command_of(replace(plan, arguments=arguments), "out", PASSED) == (
        "headwise convert org/name@c0ffee out --to mla --exact --sparse dsa "
        "--calibrate builtin --calibration-tokens 4096 --index-steps 5"
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "a/b/added_tokens.json"])
def test_a_file_without_a_record_is_a_change(model, name):
    record = {"files": hash_files(model)}
    assert changed_files(model, record) == []
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text("{}")
    changed = changed_files(model, record)
    (model / name).unlink()
    assert changed == [name]


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800"])
def test_a_record_with_an_impossible_file_name_is_refused(model, name):
    with pytest.raises(HeadwiseError, match="is not the name of a file"):
        changed_files(model, {"files": {name: "0" * 64}})
