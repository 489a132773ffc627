"""Generate three long-context tasks without a download: one key of several, variables, the most frequent word.

They follow the categories of RULER (Hsieh et al. 2024, arXiv 2404.06654): retrieval among distractors, multi-hop
tracing and aggregation. Prompts are built at run time for any tokenizer. As for the passkey task, a document is
solved if greedy decoding writes the whole answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from headwise.errors import HeadwiseError
from headwise.eval.tasks.passkey import (
    LENGTHS,
    SAMPLES,
    SLACK_TOKENS,
    count_tokens,
    filler_lines,
    find_tokenizer,
)

NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix")
WORDS = (
    "apple", "river", "candle", "window", "garden", "mirror", "pencil", "bridge", "kitchen", "feather",
    "button", "island", "ladder", "pocket", "silver", "thunder", "village", "whistle", "blanket", "compass",
    "dolphin", "engine", "forest", "harbor", "jacket", "lantern", "meadow", "needle", "orange", "pepper",
)  # fmt: skip
NUM_KEYS, NUM_VARIABLES, REPEATS = 4, 4, 4

# A task makes (begin, facts in their order, end, answer) from random numbers.
Question = tuple[str, list[str], str, str]


def key_question(rng: random.Random) -> Question:
    """Return several keys with their owners, and ask for one of them.

    Args:
        rng: the source of chance.
    """
    names = rng.sample(NAMES, NUM_KEYS)
    keys = rng.sample(range(10_000, 100_000), NUM_KEYS)
    facts = [f"The pass key of {name} is {key}." for name, key in zip(names, keys, strict=True)]
    rng.shuffle(facts)
    end = f"\n\nWhat is the pass key of {names[0]}? The pass key of {names[0]} is"
    return "Memorize the pass keys that are hidden in this text.\n\n", facts, end, str(keys[0])


def variable_question(rng: random.Random) -> Question:
    """Return a chain of assignments, and ask for the value at its end.

    Args:
        rng: the source of chance.
    """
    letters = rng.sample("ABCDEFGHKMNPRSTUVWXYZ", NUM_VARIABLES)
    value = str(rng.randint(10_000, 99_999))
    facts = [f"Variable {letters[0]} is {value}."]
    facts += [f"Variable {new} equals variable {old}." for old, new in pairwise(letters)]
    end = f"\n\nWhat is the value of variable {letters[-1]}? The value of variable {letters[-1]} is"
    return "Memorize the assignments that are hidden in this text.\n\n", facts, end, value


def word_question(rng: random.Random) -> Question:
    """Return words of which one is repeated, and ask for it.

    Args:
        rng: the source of chance.
    """
    frequent, *others = rng.sample(WORDS, 6)
    facts = [f"The word is {word}." for word in (*([frequent] * REPEATS), *others)]
    rng.shuffle(facts)
    end = "\n\nWhich word was named most often? The word that was named most often is"
    return "Count the words that are named in this text.\n\n", facts, end, frequent


def make_documents(
    make_question: Callable[[random.Random], Question],
    tokenizer: Any,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Hide the facts of questions in filler text, in their order and at random places.

    Args:
        make_question: draws a question.
        tokenizer: measures the prompts.
        lengths: most tokens of prompt and answer together; lengths that are too short for a question are left out.
        samples: documents of each length.
        seed: random seed.

    Returns:
        `{"prompt", "answer", "length"}` of each document; the prompt ends before the space that precedes the
        answer.

    Raises:
        HeadwiseError: every length is too short.
    """
    rng = random.Random(seed)
    documents = []
    for length in lengths:
        for _ in range(samples):
            begin, facts, end, answer = make_question(rng)
            question = begin + " ".join(facts) + f"{end} {answer}"
            fixed = count_tokens(tokenizer, question) + len(facts) + SLACK_TOKENS
            if fixed >= length:
                continue
            lines = filler_lines(tokenizer, length - fixed)
            places = sorted(rng.randint(0, len(lines)) for _ in facts)
            for place, fact in reversed(list(zip(places, facts, strict=True))):
                lines.insert(place, fact)
            documents.append({"prompt": begin + " ".join(lines) + end, "answer": answer, "length": length})
    if not documents:
        raise HeadwiseError(f"Prompts of {max(lengths)} tokens are too short for these tasks.", "Use longer ones.")
    return documents


def key_dataset(**arguments: Any) -> dict[str, Any]:
    """Build the data of the task headwise_multikey, with the arguments of `passkey_dataset` except `depths`."""
    return _dataset(key_question, **arguments)


def variable_dataset(**arguments: Any) -> dict[str, Any]:
    """Build the data of the task headwise_variables, with the arguments of `passkey_dataset` except `depths`."""
    return _dataset(variable_question, **arguments)


def word_dataset(**arguments: Any) -> dict[str, Any]:
    """Build the data of the task headwise_words, with the arguments of `passkey_dataset` except `depths`."""
    return _dataset(word_question, **arguments)


def _dataset(
    make_question: Callable[[random.Random], Question],
    tokenizer: Any = None,
    pretrained: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    **_: Any,
) -> dict[str, Any]:
    from datasets import Dataset

    documents = make_documents(make_question, find_tokenizer(tokenizer, pretrained), lengths, samples, seed)
    return {"test": Dataset.from_list(documents)}
