"""Run a converted folder in SGLang and in transformers, on the same token ids; print one JSON line.

    python -m benchmarks.sglang_run FOLDER --text wikitext2_raw_test.txt --dtype float32

SGLang writes 64 tokens after each of nine prompts, in one batch, and gives the log-probabilities of 1,024 tokens of
the text. The line has the fields of `benchmarks.vllm_run`. SGLang is no dependency, and needs a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_run import LENGTH, NEW, run_engine


def run_sglang(
    folder: str, prompts: list[list[int]], text: list[int], more: dict[str, Any]
) -> tuple[list[list[int]], Tensor]:
    """Return what SGLang writes after each prompt, and the log-probabilities of a text's tokens but the first."""
    os.environ.setdefault("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")
    import sglang

    usual = {"context_length": 2 * LENGTH, "disable_cuda_graph": True, "random_seed": 0, "max_running_requests": 16}
    engine = sglang.Engine(model_path=folder, **(usual | more))
    try:
        greedy = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
        written = engine.generate(input_ids=prompts, sampling_params=greedy)
        scoring = {"temperature": 0, "max_new_tokens": 1}
        (scored,) = engine.generate(
            input_ids=[text], sampling_params=scoring, return_logprob=True, logprob_start_len=0
        )
    finally:
        engine.shutdown()  # its processes hold the memory that transformers needs
    pairs = zip(text, scored["meta_info"]["input_token_logprobs"], strict=True)
    logprobs = [logprob for token, (logprob, same, _) in pairs if token == same][1:]
    return [each["output_ids"] for each in written], torch.tensor(logprobs)


def main() -> None:
    """Run both engines."""
    run_engine(__doc__, "sglang", run_sglang)


if __name__ == "__main__":
    main()
