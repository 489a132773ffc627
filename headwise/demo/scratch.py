"""A model from nothing: a byte-level BPE learned from the text, and a stock model with random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.recipes.settings import Recipe
from headwise.text import blocks as data

END_OF_TEXT = "<|endoftext|>"
_SAMPLE_CHARACTERS = 60_000_000


def train_tokenizer(texts: list[str], vocab_size: int, seed: int = 0, **options: Any) -> Any:
    """A byte-level BPE over a random sample of `texts`, as a stock fast tokenizer (which gets `options`).

    Digits stand alone and runs of spaces may join, so that numbers stay regular and indentation stays short.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    order = list(texts)
    random.Random(f"tokenizer {seed}").shuffle(order)
    sample, characters = [], 0
    for text in order:
        sample.append(text)
        characters += len(text)
        if characters >= _SAMPLE_CHARACTERS:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False, **options
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save it under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def new_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that a recipe's `init` asks for, learned from the recipe's own text."""
    assert recipe.init is not None
    texts = [text for source in recipe.data.text for text in data.documents(source, "train")]
    longest = recipe.init.config.get("max_position_embeddings", recipe.data.length)
    return train_tokenizer(texts, recipe.init.vocab_size, recipe.seed, model_max_length=longest)


def new_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The stock model that a recipe's `init` asks for, float32, random by the recipe's seed."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    assert recipe.init is not None
    fields = dict(recipe.init.config)
    model_type = fields.pop("model_type", None)
    ends = tokenizer.eos_token_id
    try:
        config = AutoConfig.for_model(
            model_type, **fields, vocab_size=len(tokenizer), eos_token_id=ends, bos_token_id=None, pad_token_id=None
        )
    except ValueError as error:
        raise HeadwiseError(f"init.config does not make a model: {error}") from None
    set_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(config)
