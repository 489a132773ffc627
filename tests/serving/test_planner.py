"""The forecast for each GPU: cache, weights, sequences and the time of a decode step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headwise.errors import SettingError
from headwise.models.layout import AttentionLayout
from headwise.serving import planner
from headwise.serving.engine_facts import Deployment
from headwise.serving.planner import ModelSize, cache_elements, forecast
from headwise.serving.settings import CARDS, ServingSettings

# Llama-3-8B.
GQA = AttentionLayout(32, 8, 128, 128, 128)
MLA = AttentionLayout(32, 32, 192, 128, 64, None, 512, 64)
LAYERS, HIDDEN, PARAMETERS = 32, 4096, 8_030_261_248


def size(layout: AttentionLayout = GQA) -> ModelSize:
    return ModelSize.of(PARAMETERS, [layout] * LAYERS, HIDDEN, 2)


def test_eight_kv_heads_beat_the_latent_at_tensor_parallel_8() -> None:
    assert cache_elements(GQA) == 2048 and cache_elements(MLA) == 576
    assert cache_elements(MLA, 8) / cache_elements(GQA, 8) == 2.25
    assert cache_elements(MLA, 8, 8) == 72
    notes = list(planner.serving_notes(GQA, [("MLA 512+64", 576), ("MLA 64+64", 128)], 256, ServingSettings(tp=8)))
    assert len(notes) == 1 and "MLA 512+64 does not pay" in notes[0] and "2.25 times as much as of" in notes[0]
    equal = list(planner.serving_notes(GQA, [("MLA 192+64", 256)], 256, ServingSettings(tp=8)))
    assert "each GPU caches as much as of the unchanged model" in equal[0]


@pytest.mark.parametrize(
    ("tp", "dcp", "elements"), [(1, 1, 2048), (2, 1, 1024), (8, 1, 256), (16, 1, 256), (16, 2, 128), (16, 8, 128)]
)
def test_kv_heads_are_divided_and_then_repeated(tp: int, dcp: int, elements: int) -> None:
    assert cache_elements(GQA, tp, dcp) == elements


def test_the_parameters_add_up() -> None:
    attention = LAYERS * HIDDEN * (32 * 256 + 8 * 256)
    assert size().other_bytes + 2 * attention == 2 * PARAMETERS
    alone = forecast([GQA] * LAYERS, size(), ServingSettings(tp=1))
    assert alone.weight_bytes == 2 * PARAMETERS
    divided = forecast([GQA] * LAYERS, size(), ServingSettings(tp=8))
    assert divided.weight_bytes == pytest.approx(2 * PARAMETERS / 8, rel=1e-9)
    latent = planner.attention_parameters(MLA, HIDDEN, 1)
    assert latent == HIDDEN * 32 * (192 + 128) + 576 * HIDDEN + 512 * 32 * 256 + 512
    factored = planner.attention_parameters(MLA, HIDDEN, 1, {"q_lora_rank": HIDDEN})
    assert factored - latent == HIDDEN * HIDDEN + HIDDEN
    assert planner.attention_parameters(replace(GQA, part="linear"), HIDDEN, 1) == 0


def test_sequences_and_time() -> None:
    settings = ServingSettings(tp=8, card="h100", cache_dtype="fp8")
    found = forecast([GQA] * LAYERS, size(), settings, 32_768)
    assert found.cache_bytes_per_token == 256 * LAYERS and found.cache_bytes == 256 * LAYERS * 32_768
    assert found.weight_bytes is not None and found.seconds_per_step is not None
    assert found.sequences == int((0.92 * 80e9 - found.weight_bytes) / found.cache_bytes)
    read = found.weight_bytes + found.sequences * found.cache_bytes
    assert found.seconds_per_step == pytest.approx(read / 3.35e12)
    assert found.tokens_per_second == pytest.approx(found.sequences / found.seconds_per_step)
    small = forecast([GQA] * LAYERS, size(), replace(settings, memory="1GB"), 32_768)
    assert small.weight_bytes and small.usable_memory == 920_000_000 < small.weight_bytes
    assert small.sequences == 0 and small.seconds_per_step is None
    unknown = forecast([GQA] * LAYERS, None, settings)
    assert unknown.weight_bytes is unknown.sequences is unknown.tokens_per_second is None


def test_a_step_of_a_mixture_reads_the_experts_that_its_tokens_select() -> None:
    mixture = ModelSize.of(PARAMETERS, [GQA] * LAYERS, HIDDEN, 2, routed=4 * 10**9, selected=8 / 128)
    assert mixture.experts_read(1) == 8 / 128 and mixture.experts_read(2) == pytest.approx(1 - (15 / 16) ** 2)
    assert mixture.experts_read(10_000) == pytest.approx(1)
    for memory, tp in ((None, 1), ("80GB", 1), ("80GB", 8)):
        settings = ServingSettings(card="h100", memory=memory, tp=tp)
        found = forecast([GQA] * LAYERS, mixture, settings, 32_768)
        dense = forecast([GQA] * LAYERS, size(), settings, 32_768)
        assert found.weight_bytes == dense.weight_bytes and found.sequences == dense.sequences
        assert found.sequences and found.cache_bytes and found.seconds_per_step and dense.seconds_per_step
        assert found.experts_read == mixture.experts_read(found.sequences) and dense.experts_read is None
        alone = found.weight_bytes - 8 * 10**9 / tp * 15 / 16 + found.cache_bytes
        assert found.seconds_for_one == pytest.approx(alone / 3.35e12)
        unread = 8 * 10**9 / tp * (15 / 16) ** found.sequences
        assert found.seconds_per_step == pytest.approx(dense.seconds_per_step - unread / 3.35e12)


def test_a_window_limits_the_cache() -> None:
    windowed = replace(GQA, sliding_window=100)
    found = forecast([GQA, windowed], None, ServingSettings(), 1000)
    assert found.cache_bytes == 2 * 2048 * (1000 + 100)


def test_an_encoder_caches_nothing_and_merged_attention_caches_both_sides() -> None:
    encoder, merged = replace(GQA, cached=False), replace(GQA, sliding_window=100, merged=True)
    found = forecast([encoder, merged], None, ServingSettings(), 1000)
    assert found.cache_bytes_per_token == 2 * 2 * 2048
    assert found.cache_bytes == 2 * 2048 * (100 + 1000)  # the window holds for tokens of the decoder only
    nothing = forecast([encoder], size(), ServingSettings(memory="80GB"), 1000)
    assert nothing.cache_bytes == 0 and nothing.sequences is None


def test_fewer_kv_heads_than_gpus_save_nothing_on_each() -> None:
    heads = [("MQA", 256.0), ("GQA-2", 256.0), ("GQA-4", 128.0)]
    notes = list(planner.serving_notes(GQA, [], 256, ServingSettings(tp=8), heads))
    assert len(notes) == 1 and notes[0].startswith(
        "MQA and GQA-2 save no cache at tensor parallel 8: engines repeat"
    )
    single = next(planner.serving_notes(GQA, [], 256, ServingSettings(tp=8), heads[:1]))
    assert single.startswith("MQA saves no cache") and single.endswith("of the unchanged model with 8 KV heads.")
    assert not list(planner.serving_notes(GQA, [], 2048, ServingSettings(tp=8), heads))


def test_kv_heads_are_repeated_for_more_gpus() -> None:
    notes = list(planner.serving_notes(GQA, [], 2048, ServingSettings(tp=16)))
    assert len(notes) == 1 and "--to gqa --groups 16" in notes[0]
    assert not list(planner.serving_notes(GQA, [], 2048, ServingSettings(tp=8)))
    single = replace(GQA, num_key_value_heads=1)
    assert "has 1 KV head for" in next(planner.serving_notes(single, [], 2048, ServingSettings(tp=8)))


@pytest.mark.parametrize(
    ("groups", "tp", "dcp", "words"),
    [
        (8, 1, None, None),
        (8, 16, 2, None),
        (10, 4, None, "tensor parallel 4 does not divide 10 KV heads"),
        (5, 4, None, "does not divide 5 KV heads"),
        (1, 4, 4, None),
        (8, 8, 2, "there are 8 GPUs for 8 KV heads"),
        (8, 16, 4, "a `dcp` of at most 2"),
        (2, 32, 8, None),
        (16, 32, 2, None),
        (32, 64, 2, "a `dcp` that divides 1, the query heads"),
    ],
)
def test_rows_that_no_server_starts(groups: int, tp: int, dcp: int | None, words: str | None) -> None:
    layout = replace(GQA, num_attention_heads=40 if groups in (5, 10) else 32, num_key_value_heads=groups)
    refusal = planner.refuse_parallelism([layout], ServingSettings(tp=tp, dcp=dcp))
    assert refusal is None if words is None else words in str(refusal)
    assert planner.refuse_parallelism([MLA], ServingSettings(tp=tp, dcp=dcp)) is None


@pytest.mark.parametrize(
    ("groups", "tp", "dcp", "words"),
    [
        (8, 4, 2, "with 8 KV heads at tensor parallel 4, no two GPUs do"),
        (8, 8, 2, "no two GPUs do"),
        (8, 16, 2, None),
        (8, 16, 4, "with 8 KV heads at tensor parallel 16, 2 GPUs repeat each"),
        (1, 4, 4, None),
    ],
)
def test_sglang_divides_the_cache_of_repeated_heads(groups: int, tp: int, dcp: int, words: str | None) -> None:
    settings = ServingSettings("sglang", tp=tp, dcp=dcp)
    refusal = planner.refuse_parallelism([replace(GQA, num_key_value_heads=groups)], settings)
    assert refusal is None if words is None else words in str(refusal)
    assert planner.refuse_parallelism([GQA], replace(settings, dcp=None)) is None
    assert planner.refuse_parallelism([MLA], settings) is None


def test_the_deployment_follows_from_the_settings() -> None:
    assert planner.deployment_of(ServingSettings()) == Deployment("unknown", "bf16", False)
    divided = ServingSettings(card="h200", cache_dtype="fp8", tp=2, dcp=2)
    assert planner.deployment_of(divided) == Deployment("hopper", "fp8", True)
    kinds = {card: planner.deployment_of(ServingSettings(card=card)).gpu for card in CARDS}
    assert kinds["b200"] == "blackwell" and kinds["mi300x"] == "amd" and kinds["a100-80gb"] == "other"
    assert set(kinds.values()) == {"hopper", "blackwell", "amd", "other"}


def test_a_refused_row_has_no_numbers() -> None:
    layout = replace(GQA, num_attention_heads=40, num_key_value_heads=10)
    found = forecast([layout], size(), ServingSettings(tp=4, card="h100"))
    assert found.refusal and found == planner.ServingForecast(planner.DEFAULT_CONTEXT, found.refusal)


@pytest.mark.parametrize("groups", [1, 2, 8, 32])
@pytest.mark.parametrize("tp", [1, 2, 8, 32])
def test_cache_and_weights_count_the_same_kv_heads(groups: int, tp: int) -> None:
    layout = replace(GQA, num_key_value_heads=groups)
    kv_heads = (planner.attention_parameters(layout, HIDDEN, tp) - HIDDEN * 32 * 256 // tp) / (HIDDEN * 256)
    assert kv_heads == cache_elements(layout, tp) / 256 == max(groups // tp, 1)


@pytest.mark.parametrize(
    ("card", "engines", "refused"), [("a100-80gb", "vllm", True), ("h100", "vllm", False), ("a100-80gb", (), False)]
)
def test_an_fp8_latent_in_vllm_needs_a_newer_card(card: str, engines: str, refused: bool) -> None:
    settings = ServingSettings(engines, card=card, cache_dtype="fp8")
    assert (planner.refuse_parallelism([MLA], settings) is not None) == refused
    assert planner.refuse_parallelism([GQA], settings) is None


def test_tp_must_divide_the_query_heads() -> None:
    with pytest.raises(SettingError, match=r"`tp` 3 does not divide the 32 query heads") as caught:
        forecast([GQA], None, ServingSettings(tp=3))
    assert caught.value.field == "tp" and "one of 1, 2, 4, 8, 16, 32" in str(caught.value.hint)
    with pytest.raises(SettingError, match=r"`tp` 32 does not divide the intermediate size 1,552") as caught:
        forecast([GQA], None, ServingSettings(tp=32), config={"intermediate_size": 1552})
    assert "one of 1, 2, 4, 8, 16." in str(caught.value.hint)


def test_the_cards_of_the_settings_are_those_of_the_file() -> None:
    assert tuple(planner._cards()) == CARDS
    assert all(card["memory"] > 1e9 and card["bandwidth"] > 1e11 for card in planner._cards().values())
