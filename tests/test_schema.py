"""The YAML loader: types are read off the dataclass, and errors name the path of the key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from headwise import fields, schema
from headwise.errors import HeadwiseError, SettingError
from headwise.fields import check_fields


@dataclass(frozen=True)
class Inner:
    count: int | None = fields.number("A count.")
    rate: float = fields.positive("A rate.", default=1.0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.count == 13:
            raise SettingError("count", "`count` and `rate` contradict each other, `inner` does not.")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner | None = None
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    more: Any = None


def build(**mapping: Any) -> Outer:
    return schema.build(Outer, {"name": "n", **mapping}, "FILE")


def test_numbers_as_people_write_them() -> None:
    built = build(inner={"count": "21M", "rate": "3e-4"}, sizes=["2k", 5], shares={"x": "5%"})
    assert built.inner == Inner(21_000_000, 3e-4)
    assert built.sizes == (2000, 5) and built.shares == {"x": 0.05}
    assert schema.parse_count("1.5k") == 1500
    for word in ("many", "1.5", "nan", ""):
        with pytest.raises(ValueError):
            schema.parse_count(word)


@pytest.mark.parametrize(
    ("mapping", "path", "message"),
    [
        ({"nam": 1}, "nam", r"FILE: unknown key nam\. Did you mean name\?"),
        ({"inner": {"cout": 1}}, "inner.cout", r"unknown key inner\.cout\. Did you mean inner\.count\?"),
        ({"inner": 3}, "inner", "`inner` is 3, which is not a mapping"),
        ({"inner": {"count": 0}}, "inner.count", "`inner.count` is 0, which is not a whole number of at least 1"),
        (
            {"inner": {"count": 13}},
            "inner.count",
            "`inner.count` and `inner.rate` contradict each other, `inner` does",
        ),
        ({"kind": "c"}, "kind", "`kind` is 'c', which is not one of a, b"),
        ({"sizes": [1, "x"]}, "sizes.1", "`sizes.1` is 'x', which is not a whole number"),
        ({"shares": {"x": None}}, "shares.x", "`shares.x` is None, which is not a number"),
        ({"name": True}, "name", "`name` is True, which is not a text"),
    ],
)
def test_errors_name_the_file_and_the_path(mapping: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(SettingError, match=f"^FILE: .*{message.removeprefix('FILE: ')}") as refused:
        build(**mapping)
    assert refused.value.field == path


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SettingError, match="FILE: name is missing"):
        schema.build(Outer, {}, "FILE")


def test_assignments_reach_into_sections(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: n\ninner: {count: 1}\n")
    assert schema.load_file(Outer, path, ["inner.count=2", "inner.rate=.5"]).inner == Inner(2, 0.5)
    assert schema.load_file(Outer, path, ["inner=null", "inner.count=3"]).inner == Inner(3)
    for assignment, message in {
        "inner.count": "not of the form a.b=c",
        "=1": "not of the form a.b=c",
        "name.x=1": "name is a plain value",
        "name=[": "'\\[' is not a YAML value",
    }.items():
        with pytest.raises(SettingError, match=message):
            schema.load_file(Outer, path, [assignment])


@pytest.mark.parametrize("text", ["- a\n", "", "a: [", "!!python/object/apply:os.getcwd []", "a: &b c\nd: *b\n"])
def test_a_file_without_a_plain_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(HeadwiseError, match=r"bad\.yaml"):
        schema.read_mapping(path)


def test_files_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("")
    assert schema.find_file("good", tmp_path) == schema.find_file(tmp_path / "good.yaml", tmp_path)
    with pytest.raises(HeadwiseError, match=r"no recipe 'god'\. Did you mean good\? The library has: good\."):
        schema.find_file("god", tmp_path)


def test_a_record_is_restored() -> None:
    built = build(inner={"count": 2}, sizes=[1, 2], more={"x": [1]})
    data = json.loads(json.dumps(asdict(built)))
    assert schema.restore(Outer, data) == built
    assert schema.restore(Outer, data | {"new": 1, "kind": "z"}).kind == "z"
    del data["sizes"]
    assert schema.restore(Outer, data).sizes == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", None),
        ("name", ["n"]),
        ("inner", []),
        ("inner", {"count": 1.5}),
        ("inner", {"rate": "0.1"}),
        ("sizes", 7),
        ("sizes", [True]),
        ("shares", {"x": 10**400}),
        ("kind", 3),
    ],
)
def test_a_record_with_a_value_of_another_type_is_refused(key: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^`{key}.*`"):
        schema.restore(Outer, asdict(build()) | {key: value})


@pytest.mark.parametrize("number", ["1" + ":1" * 3000, "1:30", "0x" + "f" * 100_000, "9" * 100_000, "1:30.5"])
def test_numbers_of_base_60_and_endless_numbers_are_text(number: str) -> None:
    assert schema.parse_yaml(f"value: {number}") == {"value": number}


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("- ", "")])
def test_deep_nesting_is_refused_before_it_takes_time(opening: str, closing: str) -> None:
    assert schema.parse_yaml(opening * 20 + "1" + closing * 20)
    with pytest.raises(ValueError, match="nested more than 32 levels deep"):
        schema.parse_yaml(opening * 20_000)


def test_only_true_and_false_are_booleans() -> None:
    assert schema.parse_yaml("language: [da, no, sv]") == {"language": ["da", "no", "sv"]}
    assert schema.parse_yaml("[true, False, yes, off]") == [True, False, "yes", "off"]
