"""What the runs of converted folders in serving engines share: prompts, and the figures against transformers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW, LENGTH = 64, 1024
PROMPTS = (1, 5, 16, 33, 64, 100, 128, 200, 257)

# Takes a folder, prompts, a text and arguments of an engine. Returns what the engine writes after each prompt, and
# the log-probabilities of the text's tokens but the first.
Run = Callable[[str, list[list[int]], list[int], dict[str, Any]], tuple[list[list[int]], Tensor]]


@torch.no_grad()
def compare(
    folder: str,
    prompts: list[list[int]],
    text: list[int],
    written: list[list[int]],
    actual: Tensor,
    device: str,
) -> dict[str, Any]:
    """Return the figures of an engine's tokens and log-probabilities, against transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    logits = model(torch.tensor([text], device=device)).logits[0, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(text[1:], device=device)[:, None])[:, 0].cpu()
    gaps = []
    for prompt, tokens in zip(prompts, written, strict=True):
        after = model(torch.tensor([prompt + tokens], device=device)).logits[0, len(prompt) - 1 : -1].float()
        chosen = after.gather(-1, torch.tensor(tokens, device=device)[:, None])[:, 0]
        gaps.append((after.max(-1).values - chosen).cpu())
    gap, apart = torch.cat(gaps), (actual - expected).abs()
    return {
        "loss, engine": -actual.double().mean().item(),
        "loss, transformers": -expected.double().mean().item(),
        "log-probabilities apart": {"mean": apart.mean().item(), "largest": apart.max().item()},
        "tokens": len(gap),
        "most probable": int((gap == 0).sum()),
        "largest gap": gap.max().item(),
    }


def run_engine(description: str | None, package: str, run: Run) -> None:
    """Run the folder of the command line in an engine and in transformers, and print one JSON line.

    Args:
        description: of the command.
        package: the engine's, which has a version.
        run: runs the engine.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", help="of the engine")
    parser.add_argument("--more", type=json.loads, default={}, help="JSON object: arguments of the engine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of transformers")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer(options.text.read_text(encoding="utf-8")[: 16 * LENGTH], verbose=False)["input_ids"]
    prompts = [ids[sum(PROMPTS[:i]) :][:length] for i, length in enumerate(PROMPTS)]
    text = ids[-LENGTH:]
    written, actual = run(options.folder, prompts, text, {"dtype": options.dtype, **options.more})
    figures = compare(options.folder, prompts, text, written, actual, options.device)
    version = __import__(package).__version__
    print(json.dumps({"folder": Path(options.folder).name, package: version, **figures}), flush=True)
