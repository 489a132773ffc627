"""Wrap every private API of a dependency in one function, with its range of versions and a test.

Nothing here is imported from a dependency at import time, so this module is free of torch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# ---------------------------------------------------------------------------------------------- transformers

# The argument that passes a KV cache to a decoder layer, in transformers 5.16 to 5.23, and in 5.24 and later.
CACHE_ARGUMENTS = ("past_key_values", "cache")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that passes a KV cache to a model.

    Versions: transformers 5.16 to 5.23 name it `past_key_values`, 5.24 and later `cache`.

    Args:
        model: a stock model.
        cache: the KV cache.
    """
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """Return the KV cache in the output of a model or of `generate`.

    Versions: transformers 5.16 to 5.23 name it `past_key_values`, 5.24 and later `cache`.

    Args:
        output: the output of a model that ran with `use_cache=True`.
    """
    return output.cache if hasattr(output, "cache") else output.past_key_values


def cache_layers(cache: Any) -> list[Any]:
    """Return the layers of a KV cache with keys and values, in the order in which attention modules run.

    The linear layers of a hybrid model have states in place of keys and values.

    Versions: transformers 5.16 to 5.24, `Cache.layers`; an `EncoderDecoderCache` has a cache for self-attention and
    one for cross-attention.

    Args:
        cache: a KV cache after a forward pass.
    """
    if not hasattr(cache, "cross_attention_cache"):
        return [layer for layer in cache.layers if hasattr(layer, "keys")]
    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    return [layer for pair in pairs for layer in pair]


def cached_elements(layer: Any) -> int:
    """Return the elements per token of one layer of a KV cache: key, value, and the key of an indexer.

    Versions: transformers 5.16 to 5.24, `DynamicIndexedLayer.indexer_keys`, (batch, tokens, width).

    Args:
        layer: from `cache_layers`, after a forward pass.
    """
    index_keys = getattr(layer, "indexer_keys", None)
    own = 0 if index_keys is None else index_keys[0, 0].numel()
    return int(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() + own)


def allocate_static_cache(cache: Any, shaped: Any, batch: int) -> None:
    """Allocate the memory of a static cache that no forward pass has used yet.

    Versions: transformers 5.16 to 5.24, `StaticCache.layers` and `StaticLayer.lazy_initialization`.

    Args:
        cache: a new `StaticCache`.
        shaped: a static cache of the same model after a forward pass; gives heads, head dimensions and dtypes.
        batch: number of sequences.
    """
    for layer, example in zip(cache.layers, shaped.layers, strict=True):
        keys, values = (t.new_empty(batch, t.shape[1], 1, t.shape[3]) for t in (example.keys, example.values))
        layer.lazy_initialization(keys, values)


def fill_static_cache(cache: Any, length: int) -> None:
    """Fill a static cache with noise and set its length.

    Versions: transformers 5.16 to 5.24, `StaticLayer.cumulative_length`.

    Args:
        cache: a `StaticCache` with allocated memory.
        length: number of tokens that the cache then holds.
    """
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)


def cache_tensors(cache: Any) -> list[Any]:
    """Return the key and value tensors of all layers of a cache.

    Versions: transformers 5.16 to 5.24, `Cache.layers`.

    Args:
        cache: a KV cache with allocated memory.
    """
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def places_of(model: Any, names: Iterable[str]) -> dict[str, str | None]:
    """Return the parameter or buffer of a model that each tensor of a checkpoint fills, alone or with others.

    Versions: transformers 5.16 to 5.24, `conversion_mapping.get_model_conversion_mapping` and
    `core_model_loading.rename_source_key`, called as `convert_and_load_state_dict_in_model` does.

    Args:
        model: a stock model; it may be on the meta device.
        names: of the checkpoint's tensors.

    Returns:
        The place of every name; None: transformers ignores the tensor.
    """
    from transformers import conversion_mapping, core_model_loading

    # Renamings keep state, so that the order of the loader matters.
    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightConverter)]
    parameters, prefix = model.state_dict(), model.base_model_prefix
    places: dict[str, str | None] = {}
    for name in sorted(names, key=core_model_loading.dot_natural_key):
        place, _ = core_model_loading.rename_source_key(name, renamings, converters, prefix, parameters)
        if place not in parameters and name in parameters:
            place = name
        places[name] = place if place in parameters else None
    return places


def run_rotary(module: Any, position: int, **arguments: Any) -> None:
    """Run a rotary module on one position, which makes it compute its frequencies for that length.

    Versions: the Qwen2-VL classes of transformers 5.16 take position ids of shape (3, batch, tokens) only; later
    versions, and all other classes, take (batch, tokens).

    Args:
        module: a stock rotary module.
        position: the position, from 0.
        arguments: more arguments of the module.
    """
    import torch

    x, positions = torch.zeros(1), torch.tensor([[position]])
    try:
        module(x, positions, **arguments)
    except IndexError:
        module(x, positions.expand(3, 1, 1), **arguments)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Suppress the progress bars of transformers and huggingface_hub, and restore the user's settings afterwards.

    Versions: transformers 5.16 to 5.24, whose switch also sets that of huggingface_hub.
    """
    from huggingface_hub import utils
    from transformers.utils import logging

    hub: Any = utils
    transformers_bars, hub_bars = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if transformers_bars:
            logging.enable_progress_bar()
        if transformers_bars and not hub_bars:
            hub.disable_progress_bars()


# --------------------------------------------------------------------------------------------------- lm-eval


def lm_eval_num_questions(task: Any, limit: float | None) -> int:
    """Return the number of questions that lm-eval takes from a task.

    Versions: lm-eval 0.4.13, `lm_eval.evaluator_utils.get_sample_size` and `Task.eval_docs`.

    Args:
        task: a loaded task.
        limit: number of questions, or a share below 1; None: all.
    """
    from lm_eval.evaluator_utils import get_sample_size

    available = len(task.eval_docs)
    return min(available, get_sample_size(task, limit) or available)


def set_lm_eval_ranks(lm: Any) -> None:
    """Make lm-eval distribute requests over all processes of accelerate, also on CPUs and on several hosts.

    lm-eval distributes requests only if it finds several GPUs, and numbers the processes of each host from 0.

    Versions: lm-eval 0.4.13, `HFLM._rank` and `HFLM._world_size`.

    Args:
        lm: a model of lm-eval.
    """
    if (accelerator := getattr(lm, "accelerator", None)) is not None:
        lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes


def load_lm_eval_weights(kind: type, load: Callable[[str], Any]) -> type:
    """Return a class of lm-eval's model whose weights come from a function, not from `from_pretrained`.

    A model that exists already would keep lm-eval from sharing the requests among processes.

    Versions: lm-eval 0.4.13, `HFLM._create_model` and `HFLM._model`.

    Args:
        kind: lm-eval's class for transformers.
        load: takes the device and returns the stock model.
    """

    def create(self: Any, *_: Any, **__: Any) -> None:
        self._model = load(str(self.device))

    return type(kind.__name__, (kind,), {"_create_model": create})


def on_lm_eval_answer(lm: Any, call: Callable[[str, Any, Any], None]) -> None:
    """Call a function after every answered request of lm-eval.

    Versions: lm-eval 0.4.13, `lm_eval.api.model.CacheHook.add_partial` and `LM.set_cache_hook`.

    Args:
        lm: a model of lm-eval.
        call: the function; takes the type of the request, its arguments and the answer.
    """
    from lm_eval.api.model import CacheHook

    hook: Any = CacheHook(None)
    hook.add_partial = call
    lm.set_cache_hook(hook)


@contextmanager
def silent_lm_eval_git() -> Iterator[None]:
    """Suppress the error output of git, which lm-eval runs in a folder that may be outside a repository.

    The output bypasses Python's streams, so redirecting them does not help.

    Versions: lm-eval 0.4.13, `lm_eval.evaluator.get_git_commit_hash`.
    """
    from lm_eval import evaluator

    original = evaluator.get_git_commit_hash

    def silent() -> Any:
        stderr = os.dup(2)
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        try:
            return original()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)

    evaluator.get_git_commit_hash = silent
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = original
