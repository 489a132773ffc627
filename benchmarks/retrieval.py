"""Measure what models retrieve from long prompts, task by task and length by length; one JSON line for each model.

    python benchmarks/retrieval.py MODEL... [--lengths 512 1024 2048 4096 7680]

The tasks are those of `headwise eval --recipe retrieval`: passkeys (50 at each length, at five depths), one key
of several, variables, and frequent words (40 each). A prompt is solved if greedy decoding writes the whole answer.
Models run in bfloat16, one prompt at a time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.eval.tasks.passkey import make_passkey_documents, solve_passkeys
from headwise.eval.tasks.retrieval import key_question, make_documents, variable_question, word_question

QUESTIONS = {"one key of several": key_question, "variables": variable_question, "frequent words": word_question}
DEPTHS, KEYS, PROMPTS = (0.0, 0.25, 0.5, 0.75, 1.0), 10, 40


def solved(model: Any, tokenizer: Any, documents: list[dict[str, Any]]) -> dict[int, float]:
    """Return the share of solved documents by length."""
    shares = defaultdict(list)
    for document in documents:
        document.setdefault("key", document.get("answer"))
    for sample in solve_passkeys(model, tokenizer, documents):
        shares[sample["doc"]["length"]].append(sample["acc"])
    return {length: round(sum(each) / len(each), 3) for length, each in sorted(shares.items())}


def main() -> None:
    """Measure every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 7680])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for folder in options.models:
        start = time.monotonic()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(options.device).eval()
        documents = {"passkeys": make_passkey_documents(tokenizer, options.lengths, DEPTHS, KEYS)}
        documents |= {
            name: make_documents(question, tokenizer, options.lengths, PROMPTS)
            for name, question in QUESTIONS.items()
        }
        row = {name: solved(model, tokenizer, each) for name, each in documents.items()}
        print(json.dumps({"model": folder.name, **row, "seconds": round(time.monotonic() - start)}), flush=True)


if __name__ == "__main__":
    main()
