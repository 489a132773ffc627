"""Measure speculative acceptance: the child drafts, its parent verifies (Leviathan et al. 2022, arXiv 2211.17192).

Greedy assisted generation of transformers writes the parent's own output. The share of drafted tokens that the
parent accepts is the child's accuracy on that output, and its value as a draft model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwise.eval.metrics.generation import make_greedy
from headwise.eval.result import DraftAcceptance


@torch.inference_mode()
def measure_acceptance(
    child: Any, parent: Any, prompts: Tensor, *, new_tokens: int, draft_tokens: int
) -> DraftAcceptance:
    """Generate with the child as draft model and count the accepted tokens.

    Args:
        child: the draft model; its generation config is replaced.
        parent: the model that verifies, on the same device, with the same tokenizer; its generation config is
            replaced.
        prompts: token ids, (prompts, length).
        new_tokens: tokens to write after each prompt.
        draft_tokens: tokens that the child drafts in one step.

    Raises:
        ValueError: transformers cannot use one of the models in assisted generation.
    """
    make_greedy(parent, new_tokens)
    make_greedy(child, new_tokens)
    child.generation_config.num_assistant_tokens = draft_tokens
    child.generation_config.num_assistant_tokens_schedule = "constant"
    child.generation_config.assistant_confidence_threshold = 0.0
    num_accepted = num_drafted = num_written = num_steps = num_exact = 0
    for prompt in prompts.to(parent.device).split(1):
        mask, length = torch.ones_like(prompt), prompt.shape[1]
        greedy = parent.generate(prompt, attention_mask=mask)[0].tolist()
        inputs: list[list[int]] = []
        handle = parent.register_forward_pre_hook(
            lambda module, args, kwargs, inputs=inputs: inputs.append(_input_ids(args, kwargs)), with_kwargs=True
        )
        try:
            text = parent.generate(prompt, attention_mask=mask, assistant_model=child)[0].tolist()
        finally:
            handle.remove()
        # The first forward pass contains the prompt, every later one the last token that was decided.
        drafts = [tokens[length if step == 0 else 1 :] for step, tokens in enumerate(inputs)]
        accepted, drafted = count_accepted(text[length:], drafts)
        num_accepted += accepted
        num_drafted += drafted
        num_steps += len(drafts)
        num_written += len(text) - length
        num_exact += text == greedy
    return DraftAcceptance(
        prompts=len(prompts),
        new_tokens=new_tokens,
        draft_tokens=draft_tokens,
        rate=num_accepted / max(num_drafted, 1),
        tokens_per_step=num_written / max(num_steps, 1),
        exact=num_exact / len(prompts),
    )


def count_accepted(text: list[int], drafts: list[list[int]]) -> tuple[int, int]:
    """Count the drafted tokens that a text contains at their place.

    Each step writes the accepted tokens of its draft and one token of the verifying model. Drafted tokens behind
    the end of the text were not decided and do not count.

    Args:
        text: the tokens that were written.
        drafts: drafted tokens of each step, in order.

    Returns:
        The number of accepted tokens and the number of decided drafted tokens.
    """
    num_accepted = num_drafted = start = 0
    for draft in drafts:
        decided = text[start : start + len(draft)]
        pairs = zip(draft, decided, strict=False)
        accepted = next((i for i, (drafted, token) in enumerate(pairs) if drafted != token), len(decided))
        num_drafted += len(decided)
        num_accepted += accepted
        start += accepted + 1
    return num_accepted, num_drafted


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    tokens: list[int] = (kwargs["input_ids"] if "input_ids" in kwargs else args[0])[0].tolist()
    return tokens
