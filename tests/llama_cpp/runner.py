"""Load a GGUF file in llama.cpp through its C API, and save logits and greedy text.

It is a process of its own, because llama.cpp may abort.

The structures of the API come from the bindings of llama-cpp-python, in the same archive as llama.cpp's source.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np


def load_bindings(root: Path) -> Any:
    """Import the plain C bindings, without the package's own requirements.

    Args:
        root: the folder of `make llama-cpp`.
    """
    os.environ["LLAMA_CPP_LIB_PATH"] = str(root / "build" / "bin")
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(root / "source" / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    import llama_cpp.llama_cpp as bindings

    return bindings


class Session:
    """One model with one context of float32 cache.

    Args:
        bindings: of llama.cpp.
        path: the GGUF file.
        overrides: metadata keys and whole numbers that replace those of the file.
        length: tokens of the context.
    """

    def __init__(self, bindings: Any, path: Path, overrides: dict[str, int], length: int) -> None:
        self.api = bindings
        bindings.llama_backend_init()
        parameters = bindings.llama_model_default_params()
        entries = (bindings.llama_model_kv_override * (len(overrides) + 1))()
        for entry, (key, value) in zip(entries, overrides.items(), strict=False):
            entry.tag, entry.key = bindings.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
            entry.value.val_i64 = value
        parameters.kv_overrides = entries
        # As `--no-repack`: without it a CPU with AMX aborts on the Q8_0 tensors of DeepSeek's attention.
        parameters.use_extra_bufts = False
        self.model = bindings.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit("llama.cpp does not load the model")
        context = bindings.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = length
        context.type_k = context.type_v = 0  # float32
        # Flash attention on a CPU rounds to float16.
        context.flash_attn_type = bindings.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.n_threads = context.n_threads_batch = 1
        self.context = bindings.llama_init_from_model(self.model, context)
        self.vocabulary = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(self.model))
        self.position = 0

    def decode(self, tokens: list[int]) -> np.ndarray:
        """Return the logits of every token, (tokens, vocabulary), after the tokens before."""
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.position + i
            batch.n_seq_id[i], batch.logits[i] = 1, 1
            batch.seq_id[i][0] = 0
        if self.api.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp does not decode the tokens")
        self.position += len(tokens)
        rows = [
            np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, i), (self.vocabulary,)).copy()
            for i in range(len(tokens))
        ]
        self.api.llama_batch_free(batch)
        return np.stack(rows)

    def clear(self) -> None:
        """Empty the cache."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.position = 0


def main() -> None:
    """Save `logits` of the tokens, and `greedy` tokens after the first ones, in an .npz file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokens", type=Path, help="an .npy file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--greedy", type=int, default=32)
    parser.add_argument("--override-kv", action="append", default=[], help="KEY=int:NUMBER")
    args = parser.parse_args()
    overrides = {key: int(value.removeprefix("int:")) for key, value in (o.split("=") for o in args.override_kv)}
    tokens = np.load(args.tokens).tolist()
    session = Session(load_bindings(args.root), args.gguf, overrides, max(len(tokens), args.prompt + args.greedy))
    logits = session.decode(tokens)
    session.clear()
    greedy = [int(session.decode(tokens[: args.prompt])[-1].argmax())]
    begin = time.perf_counter()
    while len(greedy) < args.greedy:
        greedy.append(int(session.decode(greedy[-1:])[-1].argmax()))
    rate = (args.greedy - 1) / (time.perf_counter() - begin)
    np.savez(args.out, logits=logits, greedy=np.array(greedy), tokens_per_second=rate)


if __name__ == "__main__":
    main()
