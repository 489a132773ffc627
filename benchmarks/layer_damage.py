"""Compare the damage that a conversion reports for each layer with the loss of that layer alone in the parent.

    python benchmarks/layer_damage.py PARENT CHILD --text FILE [--blocks 8] [--length 512]

CHILD is a folder that headwise wrote, with `damage` in the layers of its headwise.json. The attention of one layer
of the child, and the norm before it, take the place of the parent's. The loss of the whole model above the parent's
is the layer's true damage. Prints one JSON line: Spearman's rank correlation with the true damage of the reported
figures, of the same estimate on the text of the measurement, and of the errors of keys and values; and the lists.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.verify.layer_damage import LayerDamage
from headwise.io.reader import open_checkpoint
from headwise.measure.loss import nats_per_token
from headwise.progress import SILENT


class Guest(nn.Module):
    """A layer's attention in another model: it brings the rotary embedding of its own model."""

    def __init__(self, attention: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.attention, self.rotary = attention, rotary

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Any:
        """Attend with the positions of the host."""
        places = arguments.get("position_ids")
        if places is None:
            places = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        arguments["position_embeddings"] = self.rotary(hidden_states, places)
        return self.attention(hidden_states, **arguments)


def main() -> None:
    """Measure every layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path)
    parser.add_argument("child", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    reported = json.loads((options.child / "headwise.json").read_text(encoding="utf-8"))["layers"]
    text = options.text.read_text(encoding="utf-8")[: 8 * options.blocks * options.length]
    tokens = torch.tensor(
        AutoTokenizer.from_pretrained(options.parent)(text, add_special_tokens=False)["input_ids"]
    )
    tokens = tokens[: options.blocks * options.length].view(options.blocks, options.length)
    parent, child = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
        for folder in (options.parent, options.child)
    )
    base = nats_per_token(parent, tokens).nats
    true = []
    for ours, theirs in zip(parent.model.layers, child.model.layers, strict=True):
        kept = ours.self_attn, ours.input_layernorm
        ours.self_attn = Guest(theirs.self_attn, child.model.rotary_emb)
        ours.input_layernorm = theirs.input_layernorm
        true.append(nats_per_token(parent, tokens).nats - base)
        ours.self_attn, ours.input_layernorm = kept
    figures = {
        name: [each.get(name, 0.0) for each in reported.values()] for name in ("damage", "key_error", "value_error")
    }
    estimate = LayerDamage(open_checkpoint(options.child), open_checkpoint(options.parent), tokens.tolist())
    sequences = estimate.results(range(options.blocks), torch.device(options.device), SILENT)
    figures["estimate"] = estimate.total(sequences)
    ranks = {name: round(float(spearmanr(values, true).statistic), 3) for name, values in figures.items()}
    whole = nats_per_token(child, tokens).nats - base
    result = {"child": options.child.name, "rank correlation": ranks, "sum": sum(true), "whole": whole}
    print(
        json.dumps(result | {"reported": figures["damage"], "estimate": figures["estimate"], "true": true}),
        flush=True,
    )


if __name__ == "__main__":
    main()
