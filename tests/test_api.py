"""The verbs as functions of the package."""

from __future__ import annotations

import pytest

import headwise
from headwise.errors import HeadwiseError


@pytest.mark.parametrize("name", headwise.__all__)
def test_every_name_is_there_the_second_time_too(name: str) -> None:
    first, second = getattr(headwise, name), getattr(headwise, name)
    assert first is not None and callable(first) == callable(second)
    assert name in dir(headwise)


def test_convert_is_a_function_also_once_its_package_is_imported(tmp_path) -> None:
    import headwise.convert.plan

    with pytest.raises(HeadwiseError, match=r"no config\.json"):
        headwise.convert(tmp_path, tmp_path / "out", to="mqa")
