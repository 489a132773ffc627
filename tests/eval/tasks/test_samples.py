"""Figures of lm-eval's files are recognized by how their samples add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.eval.tasks.samples import read_results
from tests.eval.lm_eval_files import ACC, write_results


def test_each_kind_of_figure_is_recognized_by_its_samples(tmp_path: Path) -> None:
    results = write_results(
        tmp_path / "one",
        {
            "a": {"acc": ACC, "acc_norm": ACC[::-1]},
            "b": {"word_perplexity": [[-10.0, 4], [-30.0, 6]]},
            "c": {"perplexity": [-1.5, -2.5], "acc": [0.0, 1.0]},
            "d": {"f1": [[1, 0], [1, 1]]},
            "e": {"4096": [1.0, -1, 0.5, -1]},
        },
    )
    assert results.headline("a").metric == "acc_norm" and results.headline("c").metric == "acc"  # type: ignore[union-attr]
    words = results.headline("b")
    assert words and words.log and words.weights is not None and words.weights.tolist() == [4, 6]
    assert results.figures["c", "perplexity", None].log
    assert results.figures["d", "f1", None].sums is None and results.headline("d") is None
    length = results.headline("e")
    assert length and length.value == 0.75 and len(length.keys) == 2
    assert results.figures["a", "acc", None].keys[0] == "a0p" and results.figures["a", "acc", None].num_fewshot == 5


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadwiseError, match="holds no results"):
        read_results(tmp_path)
