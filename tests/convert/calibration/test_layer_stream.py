"""One layer at a time, against hooks on the stock model loaded whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

from headwise.convert.calibration.layer_stream import LayerStream
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from headwise.models.stock_match import match_source
from tests import tiny_models
from tests.convert.calibration.samples import hook_whole_model, stream
from tests.convert.rows import ROWS, row


@pytest.mark.parametrize("model_type", ROWS)
def test_a_layer_at_a_time_gives_what_the_whole_model_gives(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr("headwise.convert.calibration.layer_stream.TOKENS_AT_ONCE", 20)
    source = tiny_models.save(model_type, tmp_path / "model")
    tokens = torch.randint(3, tiny_models.VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(2))
    arch, config, _, _ = row(model_type)
    capped = getattr(arch.stock_config(config), "attn_logit_softcapping", None)
    eager = capped or arch.sinks  # whose classes have no other
    whole = hook_whole_model(source, arch, tokens, attn_implementation="eager" if eager else "sdpa")
    records = stream(source, tokens, keep_activations=True)
    attending = [layer for layer, layout in enumerate(arch.layouts(config)) if layout.attends]
    assert [record.index for record in records] == attending and len(whole) == len(attending)
    for record, here in zip(records, whole, strict=True):
        x = torch.cat([here["x"], torch.ones(3, 10, 1)], -1)[:, 1:].flatten(0, 1).double()
        pairs = ((record.inputs, here["x"]), (record.outputs, here["y"]), (record.moment, x.T @ x / 27))
        for found, wanted in pairs:
            assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        assert record.tokens == 27  # position 0 does not count


def test_layers_without_a_record_change_nothing(tmp_path):
    source = tiny_models.save("gemma2", tmp_path / "model")
    every = stream(source, tiny_models.tokens(), keep_activations=True)
    (last,) = stream(source, tiny_models.tokens(), keep_activations=True, layers=[2])
    assert last.index == 2
    for name in ("inputs", "outputs", "moment", "value_moment", "distances"):
        assert torch.equal(getattr(last, name), getattr(every[2], name))


def test_reading_ahead_changes_nothing_and_reads_each_tensor_once(tmp_path, monkeypatch):
    """As before a GPU; the last layer is the one before the end, so that one is read in vain."""
    checkpoint = match_source(open_checkpoint(tiny_models.save("gemma2", tmp_path / "model")))
    arch, tokens = find_architecture(checkpoint.config, checkpoint.tensors), tiny_models.tokens()
    wanted = list(LayerStream(checkpoint, arch, tokens).records(keep_activations=True, layers=[1]))
    read, reading = [], type(checkpoint).read

    def counted(self, name, pinned=False):
        read.append((name, pinned))
        return reading(self, name)

    monkeypatch.setattr(type(checkpoint), "read", counted)
    with ThreadPoolExecutor(2) as threads:
        ahead = LayerStream(checkpoint, arch, tokens)
        ahead._reader._threads = threads
        found = list(ahead.records(keep_activations=True, layers=[1]))
    assert torch.equal(found[0].outputs, wanted[0].outputs) and torch.equal(found[0].moment, wanted[0].moment)
    names = [name for name, _ in read]
    assert len(names) == len(set(names)) and sum(".layers." in name for name in names) == sum(
        f".layers.{layer}." in name for name in checkpoint.tensors for layer in range(3)
    )
    assert all(pinned for name, pinned in read if ".layers." in name)


@pytest.mark.parametrize("model_type", ROWS)
def test_a_record_has_the_tensors_of_its_attention(model_type, tmp_path):
    source = tiny_models.save(model_type, tmp_path / "model", torch.bfloat16)
    checkpoint = match_source(open_checkpoint(source))
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    for record in stream(source, tiny_models.tokens()):
        wanted = arch.tensors(checkpoint, record.index)
        assert record.weights.keys() == wanted.keys() >= set(arch.tensor_names(checkpoint.config, record.index))
        assert all(torch.equal(record.weights[name], tensor) for name, tensor in wanted.items())
        assert all(tensor.dtype == torch.bfloat16 for tensor in record.weights.values())


@pytest.mark.parametrize("model_type", ROWS)
def test_logits_a_layer_at_a_time_are_those_of_the_whole_model(model_type, tmp_path):
    source = tiny_models.save(model_type, tmp_path / "model", tie_word_embeddings=model_type in ("llama", "gemma2"))
    tokens = tiny_models.tokens()
    arch, _, _, _ = row(model_type)
    # Without an image, the eager form of this class lets a prompt read later tokens; its default form does not.
    form = "sdpa" if model_type == "paligemma" else "eager"
    whole = getattr(transformers, arch.auto_class).from_pretrained(source, attn_implementation=form)
    with torch.inference_mode():
        wanted = whole(input_ids=tokens, use_cache=False).logits
    checkpoint = match_source(open_checkpoint(source))
    found = LayerStream(checkpoint, find_architecture(checkpoint.config, checkpoint.tensors), tokens).logits()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
