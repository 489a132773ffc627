"""Measure nats per token of a model on a text and print one JSON object.

    python benchmarks/held_out_loss.py MODEL [--text builtin --split heldout]

MODEL is a folder or a repository of the Hub. Perplexity is exp(nats).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.io.source import find_source
from headwise.measure.loss import nats_per_token
from headwise.text.blocks import SPLITS, blocks_from


def main() -> None:
    """Parse the command line, load the model and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a repository of the Hub")
    parser.add_argument("--text", default="builtin", help="builtin, a .txt or .jsonl file, or hf:DATASET")
    parser.add_argument("--split", default="heldout", choices=SPLITS, help="part of builtin")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a block")
    parser.add_argument("--count", type=int, help="number of blocks (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of blocks")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks in one forward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    folder = find_source(options.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # bfloat16 is several times slower than float32 on most CPUs.
    dtype: Any = torch.float32 if options.device == "cpu" else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    blocks = blocks_from(
        options.text,
        tokenizer,
        split=options.split,
        length=options.length,
        count=options.count,
        seed=options.seed,
    )
    loss = nats_per_token(model.to(options.device), blocks, batch_size=options.batch_size)
    print(json.dumps({"model": options.model, **asdict(loss), "perplexity": loss.perplexity}))


if __name__ == "__main__":
    main()
