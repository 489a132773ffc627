"""An encoder-decoder layer by layer: the activations and moments of the whole stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from headwise.convert.calibration import pair_stream
from headwise.convert.refit.regression import apply_attention
from headwise.io.reader import open_checkpoint
from headwise.models.architecture import find_architecture
from headwise.models.stock import eager_if_capped, stock_config
from headwise.models.stock_match import match_source
from headwise.text.pairs import Pairs, pad
from tests import tiny_models


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(3)

    def rows(*lengths: int) -> list[list[int]]:
        return [torch.randint(3, tiny_models.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]

    return Pairs(*pad(rows(9, 12, 5, 12, 7), 12, 0), *pad(rows(5, 8, 9, 4, 7), 9, 0))


@pytest.fixture(params=["t5gemma", "t5gemma2"])
def source(tmp_path: Path, request: Any) -> Any:
    """A model with cross-attention apart, and one that merges it with self-attention."""
    return match_source(open_checkpoint(tiny_models.save(request.param, tmp_path / "model")))


def test_every_module_gets_what_it_gets_in_the_whole_model(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_stream, "TOKENS_AT_ONCE", 24)  # two pairs at once
    arch = find_architecture(source.config, source.tensors)
    form = eager_if_capped(stock_config(source.config))
    whole = AutoModelForSeq2SeqLM.from_pretrained(source.folder, **form).eval()
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(index: int) -> Any:
        return lambda _, args, kwargs, output: seen.__setitem__(index, (kwargs["hidden_states"], output[0]))

    for index in range(len(arch.order)):
        whole.get_submodule(arch.attention_path(index)).register_forward_hook(note(index), with_kwargs=True)
    given = pairs()
    with torch.no_grad():
        output = whole(**given.model_inputs())
    states = output.encoder_last_hidden_state[given.source_mask]
    records = list(pair_stream.PairStream(source, arch, given).records(keep_activations=True))
    assert [record.index for record in records] == list(range(len(arch.order)))
    for record in records:
        assert record.roots is not None
        valid = record.roots > 0
        assert record.inputs is not None and record.outputs is not None
        inputs, outputs = seen[record.index]
        torch.testing.assert_close(record.inputs[valid], inputs[valid])
        torch.testing.assert_close(record.outputs[valid], outputs[valid])
        assert not record.outputs[~valid].any()
        counted = valid.clone()
        counted[:, 0] = False
        x = inputs[counted].double()
        torch.testing.assert_close(record.moment[:-1, :-1], x.mT @ x / len(x), rtol=1e-5, atol=1e-6)
        part, _ = arch.at(record.index)
        if part.is_cross:
            assert record.states_moment is not None and record.distances is None
            y = states.double()
            torch.testing.assert_close(record.states_moment[:-1, :-1], y.mT @ y / len(y), rtol=1e-5, atol=1e-6)
        else:
            assert (record.states_moment is None) == (part.merged is None)
        # The module itself, on some of the sequences in another order, gives what was recorded.
        chosen = torch.tensor([3, 0])
        again = apply_attention(
            whole.get_submodule(arch.attention_path(record.index)), record, record.inputs[chosen], chosen
        )
        torch.testing.assert_close(again, record.outputs[chosen])


def attention_weights(output: Any, layer: int, pair: int, length: int, merged: bool) -> torch.Tensor:
    """Attention of one pair from all target tokens but the first: to the encoder; or if merged, to both."""
    weights: torch.Tensor = output.cross_attentions[layer][pair][:, 1:length].double()
    if merged:
        own = output.decoder_attentions[layer][pair][:, 1:length].double()
        own[..., 0] = 0  # a sink
        weights = torch.cat([own, weights], -1)
    return weights


def test_the_moments_are_those_of_what_attention_reads(source: Any) -> None:
    arch = find_architecture(source.config, source.tensors)
    whole = AutoModelForSeq2SeqLM.from_pretrained(source.folder, attn_implementation="eager").eval()
    given = pairs()
    inputs: dict[int, torch.Tensor] = {}
    cross = [i for i in range(len(arch.order)) if arch.at(i)[0].states]
    merged = arch.at(cross[0])[0].merged is not None
    for index in cross:
        whole.get_submodule(arch.attention_path(index)).register_forward_pre_hook(
            lambda _, args, kwargs, index=index: inputs.__setitem__(index, kwargs["hidden_states"]),
            with_kwargs=True,
        )
    with torch.no_grad():
        output = whole(**given.model_inputs(), output_attentions=True)
    for record in pair_stream.PairStream(source, arch, given).records(layers=cross):
        total, weight, attended = 0.0, 0.0, 0.0
        for row in range(len(given)):
            length = int(given.target_mask[row].sum())
            weights = attention_weights(output, cross.index(record.index), row, length, merged)
            read = output.encoder_last_hidden_state[row]
            read = (torch.cat([inputs[record.index][row], read]) if merged else read).double()
            share = weights.sum(-1, keepdim=True)  # below one where a sink is left out
            averaged = (weights @ read / share.sqrt()).flatten(0, 1)
            total, weight = total + averaged.mT @ averaged, weight + float(share.sum())
            attended = attended + read.mT @ (weights.sum((0, 1))[:, None] * read)
        assert record.value_moment is not None and record.states_moment is not None
        if merged:  # jointly, each token by the attention that it gets
            torch.testing.assert_close(record.states_moment[:-1, :-1], attended / weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(record.value_moment[:-1, :-1], total / weight, rtol=1e-4, atol=1e-6)
