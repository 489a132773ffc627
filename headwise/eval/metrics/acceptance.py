"""Speculative acceptance: the child drafts, its parent decides (Leviathan et al. 2022, arXiv 2211.17192).

Greedy assisted generation of transformers writes what the parent alone would write; the share of drafted tokens
that it keeps is how often the child is right where it matters, and what it is worth as a draft model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwise.eval.metrics.generation import make_greedy
from headwise.eval.result import Acceptance


@dataclass
class _Steps:
    """What the parent is shown while it decides: for each forward pass, the drafted tokens and their place."""

    drafts: list[tuple[int, list[int]]] = field(default_factory=list)
    prompt: int = 0

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        shown = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        before = kwargs["past_key_values"].get_seq_length()
        # The parent has seen all but the last decided token; the first time, nothing.
        start = max(before + 1, self.prompt)
        self.drafts.append((start, shown[0, start - before :].tolist()))


@torch.inference_mode()
def acceptance(child: Any, parent: Any, prompts: Tensor, *, new_tokens: int, draft_tokens: int) -> Acceptance:
    """Draft for each prompt, and compare with what the parent writes by itself.

    Args:
        child, parent: on one device, with the same tokens.
        prompts: (prompts, length).

    Raises:
        ValueError: transformers cannot take one of the two for assisted generation.
    """
    make_greedy(parent, new_tokens)
    make_greedy(child, new_tokens)
    child.generation_config.num_assistant_tokens = draft_tokens
    child.generation_config.num_assistant_tokens_schedule = "constant"
    child.generation_config.assistant_confidence_threshold = 0.0
    accepted = drafted = written = steps = exact = 0
    for prompt in prompts.to(parent.device).split(1):
        mask, length = torch.ones_like(prompt), prompt.shape[1]
        own = parent.generate(prompt, attention_mask=mask)[0].tolist()
        watch = _Steps(prompt=length)
        handle = parent.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            text = parent.generate(prompt, attention_mask=mask, assistant_model=child)[0].tolist()
        finally:
            handle.remove()
        for start, draft in watch.drafts:
            kept = text[start : start + len(draft)]  # nothing is decided about what comes after the end
            drafted += len(kept)
            accepted += next((i for i, (a, b) in enumerate(zip(draft, kept, strict=False)) if a != b), len(kept))
        steps += len(watch.drafts)
        written += len(text) - length
        exact += text == own
    return Acceptance(
        prompts=len(prompts),
        new_tokens=new_tokens,
        draft_tokens=draft_tokens,
        rate=accepted / max(drafted, 1),
        tokens_per_step=written / max(steps, 1),
        exact=exact / len(prompts),
    )
