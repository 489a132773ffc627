"""Nats per token of a causal language model on blocks of tokens: the one way headwise measures text.

python -m headwise.measure.loss MODEL --text builtin --split heldout
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from headwise._cli import console as ui


@dataclass(frozen=True)
class Perplexity:
    """Mean cross-entropy over `tokens` predicted tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)


@torch.inference_mode()
def token_nats(model: Any, blocks: Tensor, *, batch_size: int = 8) -> Tensor:
    """The cost of every predicted token, -log p(token | the tokens before it in its block).

    Args:
        model: a causal language model; it is used on the device and in the precision it is in.
        blocks: token ids of any integer type, (blocks, length). The first token of a block is given, not predicted.
        batch_size: blocks at once; changes memory and speed, not the result (beyond rounding).

    Returns:
        nats, float32 on the CPU, (blocks, length - 1). Mean over rows: cost per position. Mean over columns:
        cost per block.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = []
    for batch in blocks.split(batch_size):
        batch = batch.to(device).long()
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        rows.append(nats.float().cpu())
    model.train(was_training)
    return torch.cat(rows)


def nats_per_token(model: Any, blocks: Tensor, *, batch_size: int = 8) -> Perplexity:
    """Mean nats per predicted token of `blocks` (blocks, length); see `token_nats`."""
    nats = token_nats(model, blocks, batch_size=batch_size)
    return Perplexity(nats=nats.double().mean().item(), tokens=nats.numel())


def main(arguments: list[str] | None = None) -> None:
    """Measure one model and print one JSON object."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headwise.io.source import locate
    from headwise.text.blocks import SPLITS, blocks_from

    parser = argparse.ArgumentParser(description="Nats per token of a causal language model.")
    parser.add_argument("model", help="a folder or a name on the Hub")
    parser.add_argument("--text", default="builtin", help="builtin, a .txt or .jsonl file, or hf:DATASET")
    parser.add_argument("--split", default="heldout", choices=SPLITS, help="which part of builtin")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a block")
    parser.add_argument("--count", type=int, help="blocks (default: all there are)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    folder = locate(options.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # bfloat16 is several times slower than float32 on most CPUs, and no more exact.
    dtype: Any = torch.float32 if options.device == "cpu" else "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model.to(options.device)
    blocks = blocks_from(
        options.text,
        tokenizer,
        split=options.split,
        length=options.length,
        count=options.count,
        seed=options.seed,
    )
    result = nats_per_token(model, blocks, batch_size=options.batch_size)
    ui.configure(json=True)
    ui.result({"model": options.model, **asdict(result), "perplexity": result.perplexity})


if __name__ == "__main__":
    main()
