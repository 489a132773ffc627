"""A tiny random model of every row of architectures.yaml, made from the stock config class in milliseconds.

The shapes are odd on purpose (9, 14, 28 heads; head_dim unlike hidden_size / heads where the class permits), so
that a transposition or a wrong head order cannot hide behind equal sizes.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig

from headwise.models.protocol import find_attention_model
from headwise.models.stock import stock_config

VOCABULARY = 61

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _heads(num_attention_heads: int, num_key_value_heads: int, head_dim: int | None = None) -> dict[str, Any]:
    heads = {"num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads}
    return heads | ({"head_dim": head_dim} if head_dim else {})


_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
_SLIDING: dict[str, Any] = {
    "sliding_window": 5,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}

_LINEAR = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
_SHARED = {"shared_expert_intermediate_size": 12}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _heads(9, 3, 8) | {"attention_bias": True},
    "mistral": _heads(14, 7, 6) | {"sliding_window": 5},
    "mixtral": _heads(14, 7, 6) | _MOE,
    "ministral": _heads(14, 7, 6) | _SLIDING,
    "qwen2": _heads(14, 2)
    | {"hidden_size": 56, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen2_moe": _heads(14, 2)
    | {"hidden_size": 56, "qkv_bias": True, "shared_expert_intermediate_size": 12}
    | _MOE,
    "qwen3": _heads(14, 2, 8),
    "qwen3_moe": _heads(28, 4, 4) | _MOE,
    "gemma": _heads(9, 1, 8),
    "gemma2": _heads(9, 3, 8) | _SLIDING | {"query_pre_attn_scalar": 7},
    "gemma3_text": _heads(6, 3, 8) | _SLIDING | {"query_pre_attn_scalar": 7},
    "phi": _heads(9, 3) | {"hidden_size": 72} | _PARTIAL,
    "phi3": _heads(9, 3) | {"hidden_size": 72} | _PARTIAL,
    "gpt_neox": {"num_attention_heads": 9, "hidden_size": 72, "rope_parameters": {"partial_rotary_factor": 0.25}},
    "falcon": {
        "num_attention_heads": 9,
        "num_kv_heads": 3,
        "hidden_size": 72,
        "new_decoder_architecture": True,
        "bias": True,
    },
    "olmo": _heads(9, 3) | {"hidden_size": 72},
    "olmo2": _heads(9, 3) | {"hidden_size": 72},
    "olmo3": _heads(9, 3) | {"hidden_size": 72} | _SLIDING,
    "olmoe": _heads(9, 3) | {"hidden_size": 72} | _MOE,
    "granite": _heads(9, 3) | {"hidden_size": 72, "attention_multiplier": 0.3, "residual_multiplier": 0.4},
    "granitemoe": _heads(9, 3) | {"hidden_size": 72, "attention_multiplier": 0.3} | _MOE,
    "stablelm": _heads(9, 3) | {"hidden_size": 72, "use_qkv_bias": True} | _PARTIAL,
    "starcoder2": _heads(9, 3) | {"hidden_size": 72, "sliding_window": 5},
    "smollm3": _heads(14, 2) | {"hidden_size": 56, "num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "cohere": _heads(9, 3) | {"hidden_size": 72},
    "cohere2": _heads(9, 3) | {"hidden_size": 72} | _SLIDING,
    "glm": _heads(9, 3, 8) | {"attention_bias": True} | _PARTIAL,
    "glm4": _heads(9, 3, 8) | {"attention_bias": True} | _PARTIAL,
    "glm4_moe": _heads(9, 3, 8) | {"attention_bias": True, "use_qk_norm": True} | _ROUTED | _PARTIAL,
    "ernie4_5": _heads(9, 3, 8) | {"use_bias": True},
    "helium": _heads(9, 3, 8) | {"hidden_size": 72},
    "exaone4": _heads(9, 3, 8) | _SLIDING,
    "apertus": _heads(9, 3, 8),
    "dots1": _heads(9, 3, 8) | _ROUTED,
    "arcee": _heads(9, 3, 8),
    "seed_oss": _heads(9, 3, 8),
    "phimoe": _heads(9, 3, 8) | _MOE | {"attention_bias": True},
    "gpt_oss": _heads(9, 3, 8) | _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": _heads(9, 3, 16) | _LINEAR | _MOE | _SHARED,
    "qwen3_5_text": _heads(9, 3, 16) | _LINEAR,
    "qwen3_5_moe_text": _heads(9, 3, 16) | _LINEAR | _MOE | _SHARED,
    "lfm2": _heads(9, 3)
    | {"hidden_size": 72, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
    "granitemoehybrid": _heads(9, 3)
    | {"hidden_size": 72, "num_hidden_layers": 3, "attention_multiplier": 0.3, "residual_multiplier": 0.4}
    | {"layer_types": ["mamba", "attention", "attention"], "shared_intermediate_size": 12}
    | {"position_embedding_type": "rope"}
    | {"mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_chunk_size": 8}
    | _MOE,
    "nemotron": _heads(9, 3, 8) | {"attention_bias": True} | _PARTIAL,
}


_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 8,
}
_QWEN_VISION = {
    "depth": 1,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 8,
    "intermediate_size": 8,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}

# The tokens of an image, inside the small vocabulary.
_IMAGE_TOKENS = {"image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}

CONFIGS |= {
    "llava": {
        "text_config": _COMMON | CONFIGS["llama"] | {"model_type": "llama"},
        "vision_config": _CLIP,
        "image_token_index": 60,
    },
    "mistral3": {
        "text_config": _COMMON | CONFIGS["mistral"] | {"model_type": "mistral"},
        "vision_config": _CLIP | {"model_type": "pixtral", "image_size": 16},
        "image_token_index": 60,
    },
    "gemma3": {
        "text_config": _COMMON | CONFIGS["gemma3_text"] | {"model_type": "gemma3_text"},
        "vision_config": _CLIP | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
    },
    "paligemma": {
        "text_config": _COMMON | _heads(9, 3, 8) | {"model_type": "gemma"},
        "vision_config": _CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": 60,
        "projection_dim": 36,
        "hidden_size": 36,
        "tie_word_embeddings": False,
    },
    "idefics2": {
        "text_config": _COMMON | CONFIGS["mistral"] | {"model_type": "mistral"},
        "vision_config": {k: v for k, v in _CLIP.items() if k not in ("projection_dim", "model_type")},
        "perceiver_config": {
            "hidden_size": 36,
            "resampler_n_latents": 3,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": 2,
        },
        "image_token_id": 60,
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "text_config": _COMMON | _heads(14, 2) | {"hidden_size": 112} | _MROPE,
        "vision_config": _QWEN_VISION | {"embed_dim": 8, "hidden_size": 112},
        **_IMAGE_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": _COMMON | _heads(14, 2) | {"hidden_size": 112} | _MROPE,
        "vision_config": _QWEN_VISION | {"out_hidden_size": 112},
        **_IMAGE_TOKENS,
    },
    "qwen3_vl": {
        "text_config": _COMMON | _heads(14, 2, 8) | {"hidden_size": 112} | _MROPE,
        "vision_config": _QWEN_VISION | {"out_hidden_size": 112, "deepstack_visual_indexes": [0]},
        **_IMAGE_TOKENS,
    },
}


CONFIGS["lfm2_vl"] = {
    "text_config": _COMMON | CONFIGS["lfm2"] | {"model_type": "lfm2"},
    "vision_config": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "num_patches": 16,
    },
    "projector_hidden_size": 20,
    "image_token_id": 60,
    "tie_word_embeddings": False,
}


_MODULE = (
    _COMMON
    | _heads(6, 3, 8)
    | _SLIDING
    | {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 20.0, "final_logit_softcapping": None}
)

_MERGED = {k: v for k, v in _MODULE.items() if k != "tie_word_embeddings"} | {"attn_logit_softcapping": None}

# Models of several attention stacks, and models without a cache.
OTHERS: dict[str, dict[str, Any]] = {
    "mllama": {
        "text_config": _COMMON
        | _heads(9, 3)
        | {"hidden_size": 72, "num_hidden_layers": 4, "cross_attention_layers": [1, 2]},
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "attention_heads": 2,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 16,
            "image_size": 8,
            "patch_size": 4,
            "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        "image_token_index": 60,
    },
    "exaone4_5": {
        "text_config": _COMMON | _heads(14, 2, 8) | _SLIDING | {"hidden_size": 112, "model_type": "exaone4"},
        "vision_config": _QWEN_VISION
        | {"hidden_size": 24, "out_hidden_size": 112, "num_key_value_heads": 6, "num_heads": 6, "depth": 2},
        **_IMAGE_TOKENS,
    },
    "molmo2": {
        "text_config": _COMMON | _heads(14, 2, 8) | {"additional_vocab_size": 5, "attention_bias": True},
        "vision_config": _heads(6, 6, 4)
        | {"hidden_size": 20, "intermediate_size": 16, "num_hidden_layers": 2}
        | {"image_size": [8, 8], "patch_size": 4},
        "adapter_config": _heads(6, 3, 4)
        | {"hidden_size": 20, "intermediate_size": 16, "text_hidden_size": 36, "vision_feature_layer": [1, 0]},
        "image_patch_id": 60,
    },
    "lfm3_vl": {
        "text_config": _COMMON
        | _heads(6, 3, 8)
        | {"layer_types": ["conv", "full_attention"], "model_type": "lfm3", "tie_word_embeddings": True},
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 16,
            "patch_size": 4,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "layer_types": ["conv", "full_attention", "full_attention"],
        },
        "projector_hidden_size": 20,
        **_IMAGE_TOKENS,
    },
    "dia": {
        "encoder_config": _COMMON | _heads(6, 6, 8),
        "decoder_config": _COMMON
        | _heads(6, 3, 8)
        | {"hidden_size": 40, "cross_num_attention_heads": 6, "cross_num_key_value_heads": 6, "cross_head_dim": 4}
        | {"cross_hidden_size": 36, "num_channels": 3},
        "delay_pattern": [0, 1, 2],
    },
    "canary": {
        "vocab_size": VOCABULARY,
        "encoder_config": {
            "model_type": "parakeet_encoder",
            "hidden_size": 36,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "conv_kernel_size": 3,
            "subsampling_factor": 4,
        },
        "decoder_config": _COMMON | _heads(6, 6, 8) | {"attention_bias": True},
    },
    "moonshine_streaming": _COMMON
    | {
        "encoder_config": _COMMON | _heads(6, 6) | {"sliding_windows": [[16, 4], [16, 0]]},
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "eurobert": _COMMON | _heads(6, 3, 8) | {"attention_bias": True},
    "t5gemma2": {
        "encoder": {
            "text_config": _MERGED | {"num_hidden_layers": 2, "layer_types": _SLIDING["layer_types"][:2]},
            "vision_config": _CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "eoi_token_index": 58,
        },
        "decoder": _MERGED | {"num_attention_heads": 12},
        "image_token_index": 60,
    },
    "t5gemma": {
        "encoder": _MODULE
        | {"hidden_size": 48, "num_hidden_layers": 2, "layer_types": _SLIDING["layer_types"][:2]},
        "decoder": _MODULE,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    },
}

_HYBRID_TEXT = _COMMON | _heads(9, 3, 16) | _LINEAR | {"hidden_size": 112}
_HYBRID_TEXT |= {"rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 0.5}}
CONFIGS |= {
    "qwen3_5": _IMAGE_TOKENS
    | {"text_config": _HYBRID_TEXT, "vision_config": _QWEN_VISION | {"out_hidden_size": 112}},
    "qwen3_5_moe": _IMAGE_TOKENS
    | {
        "text_config": _HYBRID_TEXT | _MOE | _SHARED,
        "vision_config": _QWEN_VISION | {"out_hidden_size": 112},
    },
}


_LATENT = {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
_SOME_EXPERTS = {k: v for k, v in _ROUTED.items() if k != "intermediate_size"} | {"first_k_dense_replace": 1}
# Stock classes with MLA whose latent norm is not linear.
LATENTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | _SOME_EXPERTS | {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": _LATENT | _SOME_EXPERTS | {"attention_bias": True},
    "glm4_moe_lite": _LATENT | _SOME_EXPERTS | {"mlp_layer_types": ["dense", "sparse"]},
    # transformers makes the embedding of its padding token zero, whatever the file holds.
    "youtu": _LATENT | {"pad_token_id": None},
    "axk1": _LATENT | _SOME_EXPERTS,
    "minicpm3": _LATENT,
}


def config_of(model_type: str, **overrides: Any) -> dict[str, Any]:
    """What config.json holds of such a model. `overrides` go to the language model's config."""
    fields = copy.deepcopy((CONFIGS | OTHERS | LATENTS)[model_type])
    if "decoder" in fields:
        fields["decoder"] |= overrides
        if "vocab_size" in overrides:
            encoder = fields["encoder"]
            encoder.get("text_config", encoder)["vocab_size"] = fields["vocab_size"] = overrides["vocab_size"]
    elif "text_config" in fields:
        fields["text_config"] |= overrides
    else:
        fields = _COMMON | fields | overrides
    config: dict[str, Any] = json.loads(AutoConfig.for_model(model_type, **fields).to_json_string(use_diff=False))
    return config


def build(model_type: str, **overrides: Any) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """A random float32 model in eval mode, and its config as config.json would hold it.

    Every parameter is random, biases and norms too: a zero bias would hide that it was lost.
    """
    config = config_of(model_type, **overrides)
    model = from_config(config)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 + 0.3 * noise if "norm" in name and "weight" in name else 0.3 * noise)
    return model, config


def from_config(config: dict[str, Any]) -> transformers.PreTrainedModel:
    """The stock model that a config.json describes, its weights as they come."""
    auto_class = getattr(transformers, find_attention_model(config).auto_class)
    model: transformers.PreTrainedModel = auto_class.from_config(
        stock_config(config),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model.eval()
    return model


def save(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write such a model with `save_pretrained`, once a session: every test gets a copy of its own."""
    made = _saved(model_type, dtype, json.dumps(overrides, sort_keys=True))
    shutil.copytree(made.name, folder, dirs_exist_ok=True)
    return folder


@cache
def _saved(model_type: str, dtype: torch.dtype, overrides: str) -> tempfile.TemporaryDirectory[str]:
    """The folder, which lasts as long as this object does."""
    folder = tempfile.TemporaryDirectory()
    model, _ = build(model_type, **json.loads(overrides))
    model.to(dtype).save_pretrained(folder.name)  # type: ignore[arg-type]
    return folder


@contextmanager
def float64_throughout() -> Iterator[None]:
    """The stock classes round norms, softmax and rotations to float32 whatever the model's dtype; not in here."""
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
    ):
        yield


def tokens(count: int = 12) -> torch.Tensor:
    """(2, count) token ids."""
    return torch.randint(3, VOCABULARY, (2, count), generator=torch.Generator().manual_seed(5))


def inputs_of(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the arguments of a model: tokens, a source and a target of other lengths, or tokens and an image."""
    if hasattr(model.config.get_text_config(), "cross_attention_layers"):
        states = torch.randn(
            2, 5, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(2)
        )
        return {"input_ids": tokens(), "cross_attention_states": states.to(model.dtype)}
    if hasattr(getattr(model.config, "vision_config", None), "num_key_value_heads"):
        given = image_inputs(model)
        return given | {"pixel_values": given["pixel_values"].to(model.dtype)}
    generator = torch.Generator().manual_seed(4)
    if hasattr(model.config, "delay_pattern"):  # several codes at each position of the target
        return {"input_ids": tokens(), "decoder_input_ids": tokens(15).view(2, 5, 3)}
    for name, shape in (("input_features", (2, 32, 16)), ("input_values", (2, 800))):
        if model.main_input_name == name:
            sound = torch.randn(shape, generator=generator).to(model.dtype)
            return {name: sound, "decoder_input_ids": tokens(9)}
    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens()}
    return {"input_ids": tokens(), "decoder_input_ids": tokens(9).flip(0)}


def image_inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the arguments of a vision-language model for one prompt with one image in it."""
    config = model.config
    target = {"decoder_input_ids": tokens(9)[:1]} if config.is_encoder_decoder else {}
    generator = torch.Generator().manual_seed(8)
    model_type = config.model_type
    if hasattr(config.get_text_config(), "cross_attention_layers"):
        filled = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 0, 0]]])  # tiles of each image; the others are padding
        return {
            "input_ids": tokens(),
            "pixel_values": torch.randn(2, 1, 4, 3, 8, 8, generator=generator),
            "aspect_ratio_ids": torch.tensor([[3], [2]]),
            "aspect_ratio_mask": filled,
            # Two tokens of text stand before the image.
            "cross_attention_mask": filled[:, None] * (torch.arange(12) > 1)[:, None, None],
        }
    vision: Any = getattr(config, "vision_config", None)
    if hasattr(vision, "spatial_merge_size") and hasattr(vision, "temporal_patch_size"):
        # Patches of one image, four of which make a token.
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = {
            "pixel_values": torch.randn(16, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        count = 4
    elif model_type == "molmo2":  # four patches, each of which is a token
        pixels = {
            "pixel_values": torch.randn(1, 4, 48, generator=generator),
            "image_token_pooling": torch.tensor([[0, 1], [1, 2], [2, 3], [3, -1]]),
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
        }
        count = 4
    elif model_type == "lfm2_vl":
        pixels = {
            "pixel_values": torch.randn(1, 16, 48, generator=generator),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }
        count = 4
    else:
        height = 16 if model_type == "mistral3" else 8
        images = torch.randn(1, 3, height, 8, generator=generator)
        count = {"mistral3": 2, "idefics2": 3}.get(model_type, 4)
        pixels = {"pixel_values": images[None] if model_type == "idefics2" else images}
        if model_type == "mistral3":
            pixels["image_sizes"] = torch.tensor([[height, 8]])
    ids = torch.cat([tokens()[0, :3], torch.full((count,), 60), tokens()[0, 3:]])[None]
    more = {"token_type_ids": (ids == 60).long()} if model_type in ("gemma3", "paligemma") else {}
    if "image_grid_thw" in pixels:
        more = {"mm_token_type_ids": (ids == 60).int()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **more, **target}


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def checkpoint(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors `save_pretrained` writes, by their checkpoint names and in the model's dtype."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")
