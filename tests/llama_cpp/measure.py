"""Convert a model, run the result in llama.cpp, and compare it with transformers: rows of docs/results/serving.md.

make llama-cpp
python -m tests.llama_cpp.measure MODEL ...
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.io.reader import open_checkpoint
from headwise.io.source import read_config
from headwise.io.tokenizer import tokenizer_kind
from headwise.serving.engines import EngineVerdict, engine_verdicts

ROOT = Path(__file__).parents[2] / "build" / "llama.cpp"
TEXT = Path(__file__).parents[2] / "CONTRIBUTING.md"
TOKENS, PROMPT, GREEDY, WINDOW = 320, 32, 32, 64
REFUSED = "bpe of the embedded model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# The comparison is with the converted folder, so that its quality does not matter.
QUICK = {"calibrate": "none", "verify": False}
# Sparse attention with a budget that is a part of the text, and index keys of 64 elements.
BUDGET = 64
SPARSE = {
    "to": "mla", "cache": 0.5, "sparse": "dsa", "index_topk": BUDGET, "index_steps": 0, "refit": "off",
    "calibration_tokens": 2**14, "verify": False,
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """llama.cpp beside transformers in float32, on the same token ids.

    Attributes:
        kl: mean divergence from transformers, in nats per token.
        largest: largest difference of a logit.
        nats: loss in llama.cpp, in nats per token.
        expected: the same loss in transformers.
        greedy: equal tokens of greedy text.
        tokens_per_second: of greedy decoding in llama.cpp, with one thread.
    """

    kl: float
    largest: float
    nats: float
    expected: float
    greedy: int
    tokens_per_second: float


def to_gguf(folder: Path, *, outtype: str = "f32", gate: str = "open") -> Path:
    """Convert a folder to GGUF.

    Args:
        folder: the checkpoint.
        outtype: of the converter.
        gate: "stock": the converter as it is; "open": every vocabulary passes.

    Raises:
        CalledProcessError: the converter refuses it.
    """
    path = folder.with_name(f"{folder.name}-{outtype}.gguf")
    words = [str(ROOT), gate, str(folder), "--outtype", outtype, "--outfile", str(path)]
    converter = Path(__file__).with_name("converter.py")
    subprocess.run([sys.executable, converter, *words], check=True, capture_output=True, text=True)
    return path


def quantize(command: str, folder: Path) -> Path:
    """Run the `llama-quantize` line of a verdict.

    Args:
        command: of the verdict, for the folder OUT.
        folder: the converted folder, beside its bfloat16 GGUF file.
    """
    program, *words = shlex.split(command)
    source, target = (folder.with_name(f"{folder.name}-{kind}.gguf") for kind in ("bf16", words[-1]))
    options = [word for word in words[:-1] if not word.endswith(".gguf")]
    arguments = [ROOT / "build" / "bin" / program, *options, source, target, words[-1]]
    subprocess.run([str(word) for word in arguments], check=True, capture_output=True)
    return target


def in_natural_size(folder: Path, out: Path) -> None:
    """Write a folder without its powers of two: the same function.

    Args:
        folder: the converted folder.
        out: the folder to make.
    """
    checkpoint = open_checkpoint(folder)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")


def without_types(command: str) -> str:
    """Return a `llama-quantize` command without the types of single tensors.

    Args:
        command: of a verdict.
    """
    return re.sub(r" --tensor-type \S+", "", command)


def overrides_of(verdict: EngineVerdict) -> list[str]:
    """Return the `--override-kv` options of the command that serves a file.

    Args:
        verdict: of llama.cpp.
    """
    words = shlex.split(verdict.commands[-1]) if verdict.commands else []
    return [word for i, word in enumerate(words) if "--override-kv" in words[max(i - 1, 0) : i + 1]]


def token_ids(folder: Path) -> list[int]:
    """Return the tokens of a text with a model's tokenizer.

    Args:
        folder: of the model.
    """
    ids: list[int] = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return ids[:TOKENS]


def compare(folder: Path, gguf: Path, ids: Sequence[int], overrides: Sequence[str] = ()) -> Comparison:
    """Compare a GGUF file in llama.cpp with the folder in transformers.

    Args:
        folder: the checkpoint.
        gguf: the file.
        ids: the token ids.
        overrides: options of the runner.

    Raises:
        CalledProcessError: llama.cpp does not load the file.
    """
    with tempfile.TemporaryDirectory() as home:
        tokens, out = Path(home) / "tokens.npy", Path(home) / "out.npz"
        np.save(tokens, np.array(ids))
        runner = [Path(__file__).with_name("runner.py"), ROOT, gguf, tokens, out, *overrides]
        subprocess.run([sys.executable, *map(str, runner)], check=True, capture_output=True, text=True)
        found = np.load(out)
        logits, greedy = torch.from_numpy(found["logits"]).double(), found["greedy"].tolist()
        rate = float(found["tokens_per_second"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = torch.tensor([list(ids)])
    with torch.no_grad():
        expected = model(batch).logits[0].double()
        text = model.generate(
            batch[:, :PROMPT], max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, eos_token_id=None
        )[0, PROMPT:]
    here, there = expected.log_softmax(-1), logits.log_softmax(-1)
    loss = torch.nn.functional.nll_loss
    return Comparison(
        kl=float((here.exp() * (here - there)).sum(-1).mean()),
        largest=float((expected - logits).abs().max()),
        nats=float(loss(there[:-1], batch[0, 1:])),
        expected=float(loss(here[:-1], batch[0, 1:])),
        greedy=sum(a == b for a, b in zip(greedy, text.tolist(), strict=True)),
        tokens_per_second=rate,
    )


def cases(model: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of every conversion of a model that is compared.

    Args:
        model: its folder.
    """
    inspection = inspect_model(model)
    trained = AutoConfig.from_pretrained(model).max_position_embeddings
    groups = [option.num_key_value_heads for option in inspection.options if option.to == "gqa"]
    # Three KV heads have no divisor but one: they are repeated for every query head.
    grouped = {"GQA": {"to": "gqa", "groups": groups[0], **QUICK}} if groups else {"MHA": {"to": "mha"}}
    return {
        **grouped,
        "MQA": {"to": "mqa", **QUICK},
        "YaRN": {"context": 4 * trained, "rope": "yarn", "verify": False},
        "window": {"sliding_window": WINDOW, "verify": False},
        "MLA, override": {"to": "mla", "cache": 0.5, **QUICK},
        "MLA, two factors": {"to": "mla", "cache": 0.5, "engines": "llama.cpp", **QUICK},
    }


def convert(model: Path, out: Path, settings: dict[str, Any]) -> EngineVerdict:
    """Convert a model and return llama.cpp's verdict on the result.

    A SentencePiece vocabulary, which llama.cpp refuses in DeepSeek models, is hidden from a conversion to MLA, and
    that of the embedded model from every conversion that needs no text.

    Args:
        model: its folder.
        out: the folder to make.
        settings: of the conversion.
    """
    kind = tokenizer_kind(model)
    textless = not {"sparse", "index_layers"} & settings.keys()
    hidden = (kind == REFUSED and textless) or (settings.get("to") == "mla" and kind == "sentencepiece")
    source = model
    if hidden:
        source = out.with_name(f"{out.name}-source")
        shutil.copytree(model, source, ignore=shutil.ignore_patterns(*TOKENIZER_FILES))
    result = convert_model(source, out, **settings)
    assert isinstance(result, ConvertResult)
    for name in TOKENIZER_FILES if hidden else ():
        if (model / name).is_file():
            shutil.copy(model / name, out / name)
    return next(verdict for verdict in result.plan.engines if verdict.name == "llama.cpp")


def verdict_without_vocabulary(out: Path) -> EngineVerdict:
    """Return llama.cpp's verdict on a converted folder, whatever its vocabulary.

    Args:
        out: the folder.
    """
    return engine_verdicts(read_config(out), engines=["llama.cpp"])[0]


def quantizing(verdict: EngineVerdict) -> str:
    """Return the command of a verdict that quantizes.

    Args:
        verdict: of llama.cpp.
    """
    return next(command for command in verdict.commands if command.startswith("llama-quantize"))


def rows(model: Path, home: Path) -> Iterator[str]:
    """Yield the lines of the two tables: same weights, and quantized.

    Args:
        model: its folder.
        home: a folder for the results.
    """
    ids = token_ids(model)
    kept: dict[str, tuple[Path, EngineVerdict]] = {}
    for number, (name, settings) in enumerate(cases(model).items()):
        out = home / f"{number}"
        verdict = convert(model, out, settings)
        kept[name] = out, verdict
        result = compare(out, to_gguf(out), ids, overrides_of(verdict))
        yield (
            f"| {model.name} | {name} | {verdict.verdict} | {result.kl:.1e} | {result.largest:.1e} | "
            f"{result.greedy}/{GREEDY} | {result.tokens_per_second:,.0f} |"
        )
    for name in (next(iter(kept)), "MLA, two factors", "MLA, override"):
        out, verdict = kept[name]
        to_gguf(out, outtype="bf16")
        for kind in ("Q8_0", "Q4_K_M"):
            command = quantizing(verdict).replace("Q8_0", kind)
            for words in dict.fromkeys((without_types(command), command)):
                path = quantize(words, out)
                result = compare(out, path, ids, overrides_of(verdict))
                figures = f"{result.expected:.3f} | {result.nats:.3f} | {result.kl:.4f}"
                yield f"| {model.name} | {name} | `{words}` | {figures} |"


def main() -> None:
    """Print the rows of every model that the command line names."""
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as home:
            for line in rows(Path(name), Path(home)):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
