"""Write tiny stock models as GGUF files, as the converter of llama.cpp does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all.",
    "def mean(values):\n    return sum(values) / len(values)  # 12.5 of 100\n",
    "Grüße aus Köln, it's  12345 steps; don't count <|end|> twice.\n\n\tnaïve",
    "   spaces   and 7 digits 8\n",
)
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
LOCAL = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# Type of the model -> architecture of its GGUF file, name in general.name, fields of its config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Tiny", {}),
    "mistral": ("llama", "Tiny Mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", "Tiny", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Tiny", {}),
    "gemma3_text": (
        "gemma3",
        "Tiny",
        {
            "num_hidden_layers": 6,
            "sliding_window": 8,
            # transformers takes this scale for every GGUF file: the head_dim of all models but the largest.
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "rope_parameters": LOCAL,
            "tie_word_embeddings": True,
        },
    ),
}


@cache
def tiny_model(model_type: str) -> Any:
    """A random stock model in float32, its norms and biases random as well."""
    config = transformers.CONFIG_MAPPING[model_type](**(SIZES | MODELS[model_type][2]))
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)
    return model


@cache
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of 320 tokens, which splits digits and begins no text with a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"], special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 50, trainer)
    assert tokenizer.get_vocab_size() == SIZES["vocab_size"]
    return tokenizer


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the two rows of every rotary plane beside each other, as llama.cpp does for Llama."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def in_file(model_type: str, name: str, values: np.ndarray) -> np.ndarray:
    """The values of a tensor of the stock class as a GGUF file holds them."""
    if MODELS[model_type][0] == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
        return interleave(values, SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
    if MODELS[model_type][0] == "gemma3" and name.endswith("norm.weight"):
        return values + 1
    return values


def stored_as(name: str, values: np.ndarray, kind: Kind) -> Kind:
    """The quantisation type of one tensor: vectors are never quantised."""
    return kind if values.ndim > 1 else Kind.F32


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The parameters that a checkpoint holds."""
    tied = model.all_tied_weights_keys or {}
    return {name: values.detach().numpy() for name, values in model.state_dict().items() if name not in tied}


def write_gguf(
    path: Path,
    model_type: str = "llama",
    kind: Kind = Kind.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
    tokenizer: bool = True,
    split: int = 0,
) -> Path:
    """Write a tiny model.

    Args:
        path: the file.
        model_type: a key of `MODELS`.
        kind: quantisation type of its matrices.
        metadata: more keys; those of the architecture without its name, None leaves a key out.
        without: parts of the names of tensors to leave out.
        extra: more tensors.
        tokenizer: whether it has one.
        split: tensors in a part of a split file.

    Returns:
        The file, or its first part.
    """
    model, (architecture, title, _) = tiny_model(model_type), MODELS[model_type]
    config = model.config
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    values: dict[str, Any] = {
        "general.type": "model",
        "general.name": title,
        "general.license": "apache-2.0",
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        "rope.dimension_count": config.head_dim,
    }
    if getattr(config, "sliding_window", None) and architecture == "gemma3":
        values["attention.sliding_window"] = config.sliding_window
    if tokenizer:
        values |= tokenizer_metadata()
    for key, value in (values | dict(metadata or {})).items():
        if value is not None:
            known = key.startswith(("general.", "tokenizer.", "split."))
            add(writer, key if known else f"{architecture}.{key}", value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, tensor in tensors_of(model).items():
        stem, _, suffix = name.rpartition(".")
        if any(part in name for part in without):
            continue
        stored = in_file(model_type, name, tensor)
        qtype = stored_as(name, stored, kind)
        data = gguf.quants.quantize(np.ascontiguousarray(stored), qtype)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=qtype)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))))


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata value of the type that llama.cpp gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tokenizer_metadata() -> dict[str, Any]:
    """The tiny tokenizer as metadata."""
    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token, _ in vocabulary],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|begin|>{{ m['content'] }}<|end|>{% endfor %}",
    }


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    import json

    return [m if isinstance(m, list) else m.split(" ") for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def expected_tensors(model_type: str, kind: Kind, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the stock class after its values went through a GGUF file."""
    expected = {}
    for name, values in tensors_of(tiny_model(model_type)).items():
        qtype = stored_as(name, values, kind)
        stored = in_file(model_type, name, values)
        read = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(stored), qtype), qtype)
        offset = np.float32(1) if (stored != values).any() and values.ndim == 1 else np.float32(0)
        tensor = torch.from_numpy(read - offset)
        if values.ndim > 1 and (stored != values).any():
            heads = SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            planes = tensor.reshape(heads, values.shape[0] // heads // 2, 2, -1)
            tensor = planes.transpose(1, 2).reshape(values.shape)
        expected[name] = tensor.to(dtype)
    return expected
