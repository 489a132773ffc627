"""Result files as lm-eval writes them, made from samples of metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from headwise.eval.tasks.samples import TaskResults, read_results

ACC = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]


def write_results(
    folder: Path, tasks: dict[str, dict[str, list[Any]]], *, docs: list[dict[str, Any]] | None = None, **more: Any
) -> TaskResults:
    """Write the files of lm-eval for samples of metrics, and read them; `docs` adds fields to each sample."""
    folder.mkdir(parents=True)
    results: dict[str, dict[str, Any]] = {}
    for task, metrics in tasks.items():
        results[task] = {"alias": task, "sample_len": 1}
        count = len(next(iter(metrics.values())))
        rows = [
            {"doc_id": i, "filter": "none", "doc_hash": f"{task}{i}", "prompt_hash": "p", "target_hash": "t"}
            | {metric: values[i] for metric, values in metrics.items()}
            | (docs[i] if docs else {})
            for i in range(count)
        ]
        for metric, values in metrics.items():
            results[task] |= {f"{metric},none": _aggregate(metric, values), f"{metric}_stderr,none": "N/A"}
        lines = "\n".join(json.dumps(row) for row in reversed(rows))  # several processes log in any order
        (folder / f"samples_{task}_2026-01-01T00-00-00.jsonl").write_text(lines)
    direction = {
        "acc": True,
        "acc_norm": True,
        "word_perplexity": False,
        "perplexity": False,
        "f1": True,
        "4096": True,
    }
    found = {
        "results": results,
        "higher_is_better": {task: {m: direction[m] for m in metrics} for task, metrics in tasks.items()},
        "versions": {task: 1.0 for task in tasks},
        "n-shot": {task: 5 for task in tasks},
        **more,
    }
    (folder / "results_2026-01-01T00-00-00.json").write_text(json.dumps(found))
    return read_results(folder)


def _aggregate(metric: str, values: list[Any]) -> float:
    if metric == "word_perplexity":
        return math.exp(-sum(a for a, _ in values) / sum(b for _, b in values))
    if metric == "perplexity":
        return math.exp(-sum(values) / len(values))
    if metric == "f1":
        return 0.123
    counted = [value for value in values if value != -1]
    return float(sum(counted) / len(counted))
