"""Converted models in llama.cpp: the same function as in transformers exactly where the plan claims it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from headwise.convert.inspect import inspect_model
from headwise.io.source import EMBEDDED_MODEL
from headwise.io.tokenizer import tokenizer_kind
from tests.llama_cpp import measure

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (measure.ROOT / "build" / "bin" / "llama-quantize").exists(), reason="make llama-cpp"),
]
REPOSITORY = Path(__file__).parents[2]
STORIES = REPOSITORY.parent / "shared" / "models" / "stories260K"
# The layouts and positions, by the names of `measure.cases`.
NAMES = ("MHA", "GQA", "MQA", "YaRN", "window", "MLA, override", "MLA, two factors")
EXACT, ANOTHER_FUNCTION = 1e-6, 1e-3


def find_real_model() -> Path | None:
    """Return the folder or the GGUF file of a real model; None if there is none."""
    given = os.environ.get("HEADWISE_REAL_MODEL")
    files = sorted((REPOSITORY / "build" / "real" / "package").rglob("*.gguf"))
    return Path(given) if given else next(iter(files), None)


@pytest.fixture(scope="module", params=["embedded", "stories260K", "real"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "embedded":
        return Path(EMBEDDED_MODEL)
    found = STORIES if request.param == "stories260K" else find_real_model()
    if found is None or not found.exists():
        pytest.skip("no such model")
    if found.is_file():  # as many KV heads as before: the same model as a folder
        out = tmp_path_factory.mktemp("real") / "model"
        groups = inspect_model(found).layouts[0].num_key_value_heads
        measure.convert(found, out, {"to": "gqa", "groups": groups})
        return out
    return found


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_what_the_plan_says(model: Path, name: str, tmp_path: Path) -> None:
    cases = measure.cases(model)
    if name not in cases:
        pytest.skip("the model has no such layout")
    verdict = measure.convert(model, tmp_path / "out", cases[name])
    overrides = measure.overrides_of(verdict)
    assert bool(overrides) == (name == "MLA, override")
    gguf = measure.to_gguf(tmp_path / "out")
    found = measure.compare(tmp_path / "out", gguf, measure.token_ids(model), overrides)
    if verdict.verdict == "wrong":
        assert found.kl > ANOTHER_FUNCTION
    else:
        assert verdict.serves and found.kl < EXACT and found.greedy == measure.GREEDY
    if overrides:
        with pytest.raises(subprocess.CalledProcessError):
            measure.compare(tmp_path / "out", gguf, measure.token_ids(model))


@pytest.mark.timeout(3600)
def test_sparse_models(tmp_path: Path) -> None:
    """Each layer's own indexer selects the same keys; shared ones select others, for want of an epsilon."""
    model, sparse, shared = Path(EMBEDDED_MODEL), tmp_path / "sparse", tmp_path / "shared"
    measure.convert(model, sparse, measure.SPARSE)
    verdict, ids = measure.verdict_without_vocabulary(sparse), measure.token_ids(Path(EMBEDDED_MODEL))
    gguf = measure.to_gguf(sparse)
    assert verdict.serves and measure.compare(sparse, gguf, ids[: measure.BUDGET]).kl < EXACT
    assert measure.compare(sparse, gguf, ids).kl < ANOTHER_FUNCTION
    measure.to_gguf(sparse, outtype="bf16")
    command = measure.quantizing(verdict)
    assert measure.compare(sparse, measure.quantize(command, sparse), ids).kl < 0.05
    without = command.replace(" --tensor-type indexer.attn_k=bf16", "")
    assert measure.compare(sparse, measure.quantize(without, sparse), ids).kl > 1

    refused = measure.convert(sparse, shared, {"index_layers": 4, "verify": False})
    assert refused.verdict == "no"
    gguf = measure.to_gguf(shared)
    assert measure.compare(shared, gguf, ids[: measure.BUDGET]).kl < EXACT
    assert measure.compare(shared, gguf, ids).kl > ANOTHER_FUNCTION
    for folder in (sparse, shared):
        with pytest.raises(subprocess.CalledProcessError, match="returned non-zero"):
            measure.to_gguf(folder, gate="stock")


def test_quantizing_with_the_commands_of_the_plan(model: Path, tmp_path: Path) -> None:
    verdict = measure.convert(model, tmp_path / "out", measure.cases(model)["MLA, two factors"])
    measure.to_gguf(tmp_path / "out", outtype="bf16")
    ids, command = measure.token_ids(model), measure.quantizing(verdict)
    for kind, limit in (("Q8_0", 0.05), ("Q4_K_M", 1.0)):
        path = measure.quantize(command.replace("Q8_0", kind), tmp_path / "out")
        assert measure.compare(tmp_path / "out", path, ids).kl < limit
    # Powers of two keep what has no options. In an uncalibrated SmolLM2 the scales of Q4_K_M overflow.
    small = model in (Path(EMBEDDED_MODEL), STORIES)
    for kind, limit in (("Q8_0", 0.3), ("Q4_K_M", 1.0))[: 1 + small]:
        plain = measure.quantize(measure.without_types(command.replace("Q8_0", kind)), tmp_path / "out")
        found = measure.compare(tmp_path / "out", plain, ids)
        assert found.kl < limit and found.nats < found.expected + limit
    measure.in_natural_size(tmp_path / "out", tmp_path / "natural")
    measure.to_gguf(tmp_path / "natural", outtype="bf16")
    plain = measure.quantize(measure.without_types(command), tmp_path / "natural")
    assert measure.compare(tmp_path / "natural", plain, ids).kl > 1


def test_the_stock_converter_refuses_what_the_rules_name(model: Path, tmp_path: Path) -> None:
    """SentencePiece in DeepSeek models, and a BPE vocabulary that is not in its list."""
    measure.convert(model, tmp_path / "mla", measure.cases(model)["MLA, two factors"])
    (verdict,) = inspect_model(tmp_path / "mla", engines="llama.cpp").engines
    assert (verdict.verdict == "no") == (tokenizer_kind(model) in ("sentencepiece", measure.REFUSED))
    if verdict.serves:
        assert measure.to_gguf(tmp_path / "mla", gate="stock").exists()
        return
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero"):
        measure.to_gguf(tmp_path / "mla", gate="stock")
    if tokenizer_kind(model) == "sentencepiece":  # as a Llama it passes
        shutil.copytree(model, tmp_path / "llama")
        assert measure.to_gguf(tmp_path / "llama", gate="stock").exists()
