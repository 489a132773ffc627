"""Make a new model: a byte-level BPE learned from the text, and a stock model with random weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from headwise.demo.settings import PretrainSettings
from headwise.errors import SettingError
from headwise.io.workdir import write_file_atomically
from headwise.text.sources import documents

END_OF_TEXT = "<|endoftext|>"
_SAMPLE_CHARACTERS = 60_000_000


def train_tokenizer(texts: list[str], vocab_size: int, seed: int = 0, **options: Any) -> Any:
    """Learn a byte-level BPE from a random sample of texts.

    Digits are tokens of their own and runs of spaces may join: numbers are regular and indentation is short.

    Args:
        texts: documents.
        vocab_size: tokens of the vocabulary.
        seed: of the sample.
        options: of the tokenizer class.

    Returns:
        A stock fast tokenizer.
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
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False, **options
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer under the class name that transformers 4 and 5 both load.

    Args:
        tokenizer: a stock fast tokenizer.
        folder: where it goes.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_file_atomically(path, (json.dumps(config, indent=2) + "\n").encode())


def new_tokenizer(settings: PretrainSettings) -> Any:
    """Learn the tokenizer of a pretraining from its text.

    Args:
        settings: of the pretraining.
    """
    texts = [t for source in settings.data.text for t in documents(source, "train") if isinstance(t, str)]
    longest = settings.init.config.get("max_position_embeddings", settings.data.length)
    return train_tokenizer(texts, settings.init.vocab_size, settings.train.seed, model_max_length=longest)


def new_model(settings: PretrainSettings, tokenizer: Any) -> Any:
    """Make the stock model of a pretraining, float32, with random weights.

    Args:
        settings: of the pretraining.
        tokenizer: the model's.

    Raises:
        SettingError: `init.config` is not a legal config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    fields = dict(settings.init.config)
    model_type = fields.pop("model_type", None)
    ends = tokenizer.eos_token_id
    try:
        config = AutoConfig.for_model(
            model_type, **fields, vocab_size=len(tokenizer), eos_token_id=ends, bos_token_id=None, pad_token_id=None
        )
    except ValueError as error:
        raise SettingError("init.config", f"init.config does not make a model: {error}") from None
    set_seed(settings.train.seed)
    model_class: Any = AutoModelForCausalLM
    return model_class.from_config(config)
