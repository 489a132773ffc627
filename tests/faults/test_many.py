"""Long runs: many conversions in one process, and the memory forecast against what a process really takes."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest

from headwise.convert.pipeline import convert_model
from tests.convert.speaking import save_speaking
from tests.faults.worlds import SHAPE

# name: hidden size, layers, heads, key-value heads, head_dim, intermediate size, vocabulary; the conversion.
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, object]]] = {
    "mean, wide": ((2048, 4, 16, 16, 128, 5632, 32000), {"to": "gqa", "groups": 4, "method": "mean"}),
    "optimal, wide": ((2048, 2, 16, 16, 128, 5632, 32000), {"to": "gqa", "groups": 4}),
    "optimal, calibrated": (
        (1024, 2, 16, 16, 64, 2816, 257),
        {"to": "gqa", "groups": 4, "calibrate": "builtin", "calibration_tokens": 4096, "refit": "off"},
    ),
    "optimal, refit": (
        (768, 2, 12, 12, 64, 2048, 257),
        {"to": "gqa", "groups": 4, "calibrate": "builtin", "calibration_tokens": 8192, "refit": 8},
    ),
    "mla": ((1024, 2, 16, 16, 64, 2816, 257), {"to": "mla", "cache": 0.25}),
    "mla, exact": ((1024, 2, 16, 16, 64, 2816, 257), {"to": "mla", "exact": True}),
    "mla, refit": (
        (768, 2, 12, 12, 64, 2048, 257),
        {"to": "mla", "cache": 0.25, "calibrate": "builtin", "calibration_tokens": 8192, "refit": 8},
    ),
}
CHILD = """
import json, sys
from headwise.convert.pipeline import convert_model
model, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
plan = convert_model(model, out, device="cpu", verify=False, **options).plan
# Of this program alone; getrusage would count what the process was before it became this program.
lines = open("/proc/self/status").read().splitlines()
print(plan.peak_memory, 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


@pytest.mark.full
@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_forecast(tmp_path: Path, name: str) -> None:
    import json

    (width, layers, heads, groups, head_dim, intermediate, vocabulary), options = SHAPES[name]
    source = save_speaking(
        tmp_path / "model", hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=head_dim, intermediate_size=intermediate, vocab_size=vocabulary,
        max_position_embeddings=1024,
    )  # fmt: skip
    options = {"calibrate": "none", **options}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, source, tmp_path / "out", json.dumps(options)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    forecast, measured = map(int, done.stdout.split())
    print(f"{name}: forecast {forecast >> 20} MiB, measured {measured >> 20} MiB, {forecast / measured - 1:+.0%}")
    assert 0.75 < forecast / measured < 1.25


@pytest.mark.full
def test_five_hundred_conversions_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    source = save_speaking(tmp_path / "source", **SHAPE)
    process = psutil.Process()
    seen = []
    for number in range(500):
        method = ("mean", "optimal")[number % 2]
        options = {"to": "mla", "exact": True} if number % 10 == 9 else {"to": "gqa", "groups": 2, "method": method}
        convert_model(source, tmp_path / "out", calibrate="none", force=True, verify=number % 5 == 0, **options)
        if number % 50 == 49:
            gc.collect()
            seen.append((process.memory_info().rss, process.num_fds(), threading.active_count()))
    print([(rss >> 20, handles, threads) for rss, handles, threads in seen])
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    assert len({handles for _, handles, _ in seen}) == 1 and len({threads for _, _, threads in seen}) == 1
    # Between the first hundred and the last, less than a megabyte per hundred conversions.
    assert seen[-1][0] - seen[1][0] < 8 << 20
    assert not list((tmp_path / "temporary").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "temporary"}
