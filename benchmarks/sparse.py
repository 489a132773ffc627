"""Loss, recall and passkeys of sparse attention at budgets of a context: random keys, a window, indexers.

    python benchmarks/sparse.py --context 2048 --blocks 6
    python benchmarks/sparse.py --folder OUT --context 1024 --passkeys 8
    python benchmarks/sparse.py --context 4096 --rank 192 --rope-dim 64 --device cuda

The model is converted twice with `--sparse dsa`: with the closed form of the indexers alone, and trained. The stock
class then runs on held-out text with the keys that each selection gives it. The dense model is the same folder with
a budget of the whole context. With --folder, a converted folder is measured on passkeys alone, at 1/4 and 1/8:
numbers hidden in a text, which greedy decoding must write. Prints Markdown tables; --json keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.pipeline import convert_model
from headwise.convert.sparse.indexer import index_scores, query_scale, read_indexer, select
from headwise.convert.sparse.warm_up import summed_attention
from headwise.eval.tasks.passkey import make_passkey_documents, passkey_shares, solve_passkeys
from headwise.io.reader import open_checkpoint
from headwise.io.source import EMBEDDED_MODEL
from headwise.measure.positions import loss_by_position
from headwise.models.deepseek import NORM_EPS
from headwise.models.protocol import find_attention_model, read_latent_layer
from headwise.text.blocks import blocks_from

SHARES = (4, 8, 16)
# Queries of a sequence whose attention is computed for the recall, from the second half of the context.
QUERIES = 128


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def random_scores(queries: int, tokens: int, device: Any) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(queries + tokens)
    return torch.rand(1, queries, tokens, generator=generator, device=device)


def recent_scores(queries: int, tokens: int, device: Any) -> Tensor:
    return torch.arange(tokens, device=device, dtype=torch.float32).expand(1, queries, tokens)


def set_selection(model: Any, budget: int, scores: Callable[..., Tensor] | None) -> None:
    """Make every layer select `budget` keys: by scores of positions alone, or by its indexer."""
    for attention in attentions(model):
        indexer = attention.indexer
        indexer.index_topk = budget
        indexer.__dict__.pop("forward", None)
        if scores is None:
            continue

        def forward(hidden: Tensor, _: Any, __: Any, mask: Tensor, *___: Any, **____: Any) -> Tensor:
            own = scores(hidden.shape[1], mask.shape[-1], hidden.device).expand(len(hidden), -1, -1)
            past = mask if mask.dtype == torch.bool else mask >= 0
            chosen = own.masked_fill(~past, -torch.inf).topk(min(budget, own.shape[-1]), dim=-1)
            return chosen.indices.to(torch.int32)

        indexer.forward = forward


def layer_inputs(model: Any, block: Tensor) -> list[Tensor]:
    """The inputs of every layer's attention, (tokens, D) each."""
    inputs: list[Tensor] = []
    handles = [
        a.register_forward_pre_hook(
            lambda _, __, given: inputs.append(given["hidden_states"][0].float().cpu()), with_kwargs=True
        )
        for a in attentions(model)
    ]
    with torch.inference_mode():
        model(input_ids=block[None].to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return [x.clone() for x in inputs]


def recalls(folder: Path, inputs: list[list[Tensor]]) -> Iterator[dict[str, list[float]]]:
    """The share of each layer's attention on the selected keys, by selection, at each of SHARES."""
    checkpoint = open_checkpoint(folder)
    stock = find_attention_model(checkpoint.config, checkpoint.tensors)
    for layer in range(len(inputs[0])):
        tensors, path = stock.tensors(checkpoint, layer), stock.attention_path(layer)
        latent = read_latent_layer(checkpoint, layer)[0].to(torch.float32)
        heads, scale = checkpoint.config["index_n_heads"], query_scale(tensors, path, NORM_EPS)
        indexer = read_indexer(tensors, path, heads, scale, latent.frequencies).to(torch.float32)
        rows: dict[str, list[float]] = {
            name: [0.0] * len(SHARES) for name in ("random", "window", "indexer", "best")
        }
        for block in inputs:
            x = block[layer]
            tokens = len(x)
            positions = torch.arange(tokens // 2, tokens, max(1, tokens // 2 // QUERIES))
            attention = summed_attention(latent, x, positions)[0]
            scored = {
                "random": random_scores(len(positions), tokens, "cpu"),
                "window": recent_scores(len(positions), tokens, "cpu"),
                "indexer": index_scores(indexer, x[None], positions),
                "best": attention[None],
            }
            for name, scores in scored.items():
                for i, share in enumerate(SHARES):
                    chosen = select(scores, tokens // share, positions)[0]
                    rows[name][i] += float((attention * chosen).sum(-1).mean()) / len(inputs)
        yield rows


def passkeys(folder: Path, length: int, samples: int, device: str) -> Iterator[tuple[str, int, list[float]]]:
    """The share of passkeys that a sparse folder finds, by selection and budget, at five depths of the text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = make_passkey_documents(tokenizer, [length], samples=samples)
    cases: list[tuple[str, int, Any]] = [("dense", length, recent_scores)]
    selections = (("random keys", random_scores), ("window", recent_scores), ("trained", None))
    cases += [(name, length // share, scores) for share in SHARES[:2] for name, scores in selections]
    for name, budget, scores in cases:
        set_selection(model, budget, scores)
        yield name, budget, list(passkey_shares(solve_passkeys(model, tokenizer, documents)).values())


def print_passkeys(options: argparse.Namespace) -> dict[str, list[float]]:
    """Print the passkeys that a folder finds, and return them."""
    prompts = 5 * options.passkeys
    print(f"Passkeys found at {options.context:,} tokens, {prompts} prompts:\n")
    print("| selection | keys | found | by depth |\n|---|---|---|---|", flush=True)
    found = {}
    for name, budget, shares in passkeys(options.folder, options.context, options.passkeys, options.device):
        found[f"{name} {budget}"] = shares
        depths = ", ".join(f"{value:.0%}" for value in shares)
        print(f"| {name} | {budget:,} | {sum(shares) / len(shares):.1%} | {depths} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED_MODEL))
    parser.add_argument(
        "--context", type=int, default=4096, help="the model is stretched to it, and measured at it"
    )
    parser.add_argument("--rank", type=int, help="of a lossy MLA; default: lossless")
    parser.add_argument("--rope-dim", type=int)
    parser.add_argument("--index-heads", type=int, default=8)
    parser.add_argument("--index-head-dim", type=int)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--calibrate", default="builtin")
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--heldout", default="builtin")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="of --sparse dsa: measure its passkeys alone, at --context")
    parser.add_argument("--passkeys", type=int, default=8, help="prompts at each depth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.folder:
        found = print_passkeys(options)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
        return

    context, figures = options.context, dict[str, Any](options={k: str(v) for k, v in vars(options).items()})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held = blocks_from(options.heldout, tokenizer, split="heldout", length=context, count=options.blocks)
    shape = {"to": "mla", "rank": options.rank, "rope_dim": options.rope_dim} if options.rank else {}
    budgets = [context // share for share in SHARES]
    width = context // 8
    with tempfile.TemporaryDirectory() as home:
        folders = {}
        for name, steps in (("closed form", 0), ("trained", options.steps)):
            start = time.monotonic()
            folders[name] = Path(home, name.replace(" ", "-"))
            convert_model(
                options.model, folders[name], sparse="dsa", context=context, dtype="float32", verify=False,
                index_topk=budgets[1], index_heads=options.index_heads, index_head_dim=options.index_head_dim,
                index_steps=steps, calibrate=options.calibrate, calibration_tokens=options.calibration_tokens,
                device=options.device, **(shape | {"refit": "off"} if shape else {}),
            )  # fmt: skip
            print(f"{name}: converted in {time.monotonic() - start:.0f} s", flush=True)

        models = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
            for name, folder in folders.items()
        }

        def losses(model: Any, budget: int, scores: Callable[..., Tensor] | None = None) -> Any:
            set_selection(model, budget, scores)
            return loss_by_position(model, held, width=width)

        dense = losses(models["trained"], context)
        inputs = [layer_inputs(models["trained"], block) for block in held[:2]]
        mean = sum(dense.nats) / len(dense.nats)
        print(f"\n{dense.tokens:,} held-out tokens in windows of {context:,}; dense {mean:.4f} nats per token\n")
        print("| selection | budget | loss over dense, nats | last eighth, nats |\n|---|---|---|---|", flush=True)
        figures["dense"] = dense.to_dict()
        rows: dict[str, dict[int, list[float]]] = {}
        cases: list[tuple[str, Any, Any]] = [
            ("random keys", models["trained"], random_scores),
            ("window", models["trained"], recent_scores),
            ("closed form", models["closed form"], None),
            ("trained", models["trained"], None),
        ]
        for share, budget in zip(SHARES, budgets, strict=True):
            for name, model, scores in cases:
                found = losses(model, budget, scores)
                over = [a - b for a, b in zip(found.nats, dense.nats, strict=True)]
                rows.setdefault(name, {})[share] = over
                print(f"| {name} | 1/{share} | {sum(over) / 8:.4f} | {over[-1]:.4f} |", flush=True)
        figures["over"] = rows
        for share, budget in zip(SHARES[:2], budgets, strict=False):
            print(f"\nLoss over dense by position, budget 1/{share} ({budget} keys), intervals of {width}:\n")
            print("| selection |" + "".join(f" {i * width} |" for i in range(8)) + "\n|---|" + "---|" * 8)
            for name, by_share in rows.items():
                print(f"| {name} |" + "".join(f" {value:.4f} |" for value in by_share[share]), flush=True)
        print(f"\nRecall of the attention of a layer at {', '.join(f'1/{share}' for share in SHARES)}:\n")
        print("| layer | random | window | closed form | trained | best |\n|---|---|---|---|---|---|")
        figures["recall"] = []
        pairs = zip(recalls(folders["closed form"], inputs), recalls(folders["trained"], inputs), strict=True)
        for layer, (closed, trained) in enumerate(pairs):
            row = {**trained, "closed form": closed["indexer"], "trained": trained["indexer"]}
            figures["recall"].append(row)
            names = ("random", "window", "closed form", "trained", "best")
            cells = (", ".join(f"{value:.3f}" for value in row[name]) for name in names)
            print(f"| {layer} | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
