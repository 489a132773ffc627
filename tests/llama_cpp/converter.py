"""Run llama.cpp's converter, with or without its gate on vocabularies.

The gate refuses BPE vocabularies that it does not know, SentencePiece in DeepSeek models, sparse ones without
`add_bos_token`, and vocabularies without GLM's special tokens where indexers are shared. The tests compare logits
of the same token ids, for which the vocabulary does not matter.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def open_gate() -> None:
    """Let every vocabulary pass."""
    from conversion.base import TextModel
    from conversion.deepseek import DeepseekV2Model, DeepseekV32Model
    from conversion.glm import GlmMoeDsaModel

    def set_vocabulary(model: Any) -> None:
        if (model.dir_model / "tokenizer.model").is_file():
            model._set_vocab_sentencepiece()
        else:
            model._set_vocab_gpt2()

    TextModel.get_vocab_base_pre = lambda model, tokenizer: "gpt-2"
    for converter in (DeepseekV2Model, DeepseekV32Model, GlmMoeDsaModel):
        converter.set_vocab = set_vocabulary


def main() -> None:
    """Convert with the arguments of convert_hf_to_gguf.py; the first two are the root and "open" or "stock"."""
    root, gate = Path(sys.argv.pop(1)), sys.argv.pop(1)
    sys.path[:0] = [str(root / "source" / "vendor" / "llama.cpp"), str(root / "python")]
    import convert_hf_to_gguf

    if gate == "open":
        open_gate()
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
