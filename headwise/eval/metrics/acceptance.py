"""Measure speculative acceptance: the child drafts, its parent verifies (Leviathan et al. 2022, arXiv 2211.17192).

Greedy speculative decoding writes the parent's own greedy text, whatever the draft. A drafted token is accepted
if it and the drafted tokens before it are that text. So one forward pass of the child over the text decides every
step, and no draft has to be generated. The share of accepted tokens is the child's value as a draft model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.eval.metrics.generation import write_continuations
from headwise.eval.result import DraftAcceptance


@torch.inference_mode()
def measure_acceptance(
    child: Any, parent: Any, prompts: Tensor, *, new_tokens: int, draft_tokens: int
) -> DraftAcceptance:
    """Write greedy text with the parent, and count the tokens that the child would have drafted right.

    Args:
        child: the draft model.
        parent: the model that verifies, on the same device, with the same tokenizer; its generation config is
            replaced.
        prompts: token ids, (prompts, length).
        new_tokens: tokens to write after each prompt.
        draft_tokens: tokens that the child drafts in one step.
    """
    num_accepted = num_drafted = num_written = num_steps = 0
    for prompt, text in zip(prompts, write_continuations(parent, prompts, new_tokens), strict=True):
        tokens = torch.cat((prompt, torch.tensor(text, dtype=prompt.dtype)))[None, :-1].to(child.device)
        drafts = child(tokens).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        accepted, drafted, steps = count_accepted(text, drafts, draft_tokens)
        num_accepted += accepted
        num_drafted += drafted
        num_steps += steps
        num_written += len(text)
    return DraftAcceptance(
        prompts=len(prompts),
        new_tokens=new_tokens,
        draft_tokens=draft_tokens,
        rate=num_accepted / max(num_drafted, 1),
        tokens_per_step=num_written / max(num_steps, 1),
    )


def count_accepted(text: Sequence[int], guesses: Sequence[int], draft_tokens: int) -> tuple[int, int, int]:
    """Count the drafted tokens that a text contains at their place.

    Each step writes the accepted tokens of its draft and one token of the verifying model. Drafted tokens behind
    the end of the text were not decided and do not count.

    Args:
        text: the tokens that were written.
        guesses: the child's most likely token at each place of the text, given the text before it.
        draft_tokens: tokens that the child drafts in one step.

    Returns:
        The number of accepted tokens, of decided drafted tokens, and of steps.
    """
    num_accepted = num_drafted = num_steps = start = 0
    while start < len(text):
        end = min(start + draft_tokens, len(text))
        right = next((place for place in range(start, end) if guesses[place] != text[place]), end) - start
        num_accepted += right
        num_drafted += end - start
        num_steps += 1
        start += right + 1
    return num_accepted, num_drafted, num_steps
