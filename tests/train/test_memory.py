"""The memory forecast against the memory of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, LlamaForCausalLM

from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.io.source import EMBEDDED_MODEL
from headwise.train import memory
from headwise.train.memory import ModelShape, forecast_memory, require_memory
from headwise.train.settings import Lora, Training
from headwise.train.student import ModelFolder

LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
TRAINING = Training(tokens=10**6, batch_tokens=8192)
LENGTH = 1024

# Two steps of distillation, and the growth of resident memory from before the models were made.
RUN = r"""
import json, re, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from headwise.train import losses
torch.set_num_threads(1)
# getrusage would count the process that started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
config, tokens, checkpointing = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
before = peak()
student, teacher = (LlamaForCausalLM(LlamaConfig(**config, use_cache=False)) for _ in range(2))
teacher.requires_grad_(False)
if checkpointing:
    student.gradient_checkpointing_enable({"use_reentrant": False})
student.train()
optimizer = torch.optim.AdamW(student.parameters(), fused=True)
ids = torch.randint(0, config["vocab_size"], (tokens // 256, 256))
for _ in range(2):
    with torch.no_grad():
        theirs = teacher(input_ids=ids).logits.flatten(0, 1)
    ours = student(input_ids=ids).logits.flatten(0, 1)
    weights = torch.full((tokens,), 1 / tokens)
    losses.over_tokens(losses.forward_kl, ours, theirs, weights=weights).backward()
    optimizer.step()
    optimizer.zero_grad()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in other units elsewhere")
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_forecast_is_what_a_run_takes(checkpointing: bool) -> None:
    sizes = {"vocab_size": 4096, "hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6}
    config = LlamaConfig(**sizes, num_attention_heads=5)
    arguments = [json.dumps({**sizes, "num_attention_heads": 5}), "1024", str(checkpointing)]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    with torch.device("meta"):
        parameters = LlamaForCausalLM(config).num_parameters()
    shape = ModelShape.of(config, parameters)
    found = forecast_memory(
        shape,
        num_trained=parameters,
        tokens=1024,
        teacher=shape,
        bf16=False,
        checkpointing=checkpointing,
        accumulates=False,
    )
    assert int(done.stdout) == pytest.approx(found.total - found.overhead, rel=0.25)


@pytest.mark.parametrize("bytes_per_element", [2, 4])
@pytest.mark.parametrize("latent", [False, True])
def test_what_a_layer_saves_is_counted(latent: bool, bytes_per_element: int) -> None:
    fields = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 208, "num_attention_heads": 8}
    if latent:
        sizes = {"kv_lora_rank": 40, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
        fields |= sizes | {"num_key_value_heads": 8, "q_lora_rank": None, "first_k_dense_replace": 9}
    configs = [(DeepseekV3Config if latent else LlamaConfig)(**fields, num_hidden_layers=n) for n in (1, 2)]
    counted = [_saved(config, 61, bytes_per_element == 2) for config in configs]
    forecast = ModelShape.of(configs[0], 10**5).saved_bytes_per_token(bytes_per_element)
    assert (counted[1] - counted[0]) / 61 == pytest.approx(forecast, rel=0.1)


def _saved(config, tokens: int, amp: bool) -> int:
    """Bytes of activations that autograd keeps, each once; weights and copies of weights have no axis of tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    kept = {}

    def pack(tensor):
        if tokens in tensor.shape or tokens * config.num_attention_heads in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=amp):
        hidden = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert hidden
    return sum(storage.nbytes() for storage in kept.values())


def test_a_7b_student_beside_its_parent() -> None:
    shape = ModelShape.of(LLAMA_7B, 6_738_415_616)
    options: dict[str, Any] = {
        "num_trained": shape.num_parameters,
        "tokens": 4096,
        "teacher": shape,
        "checkpointing": True,
    }
    one = forecast_memory(shape, **options)
    assert (one.parameters, one.gradients, one.optimizer) == tuple(n * shape.num_parameters for n in (4, 4, 8))
    assert 125e9 < one.total < 141e9
    two = forecast_memory(shape, **options, num_shards=2)
    assert 0.5 * one.total < two.total < 0.58 * one.total
    # In a single pass the gradients fill as the activations are freed.
    single = forecast_memory(shape, **options, num_shards=2, accumulates=False)
    assert single.parts == two.parts and single.apart == two.activations + two.logits < two.gradients
    assert single.total == two.total - single.apart
    # DDP keeps everything on each GPU, and the gradients twice.
    ddp = forecast_memory(shape, **options, num_replicas=2)
    assert ddp.total > one.total + 4 * shape.num_parameters
    assert forecast_memory(shape, **options, num_replicas=2, accumulates=False) == ddp


def test_a_window_keeps_the_activations_of_its_layers_and_no_logits() -> None:
    shape = ModelShape.of(LLAMA_7B, 6_738_415_616)
    options: dict[str, Any] = {"num_trained": 10**9, "tokens": 4096, "teacher": shape, "bf16": False}
    whole, windows = forecast_memory(shape, **options), forecast_memory(shape, **options, window=4)
    assert windows.logits == 0 and windows.activations == pytest.approx(4.5 / 32.5 * whole.activations)
    same = ("parameters", "gradients", "optimizer", "teacher")
    assert all(windows.parts[name] == whole.parts[name] for name in same)
    assert forecast_memory(shape, **options, window=99).activations == whole.activations


def test_a_run_that_does_not_fit_is_refused_with_what_would() -> None:
    shape = ModelShape.of(LLAMA_7B, 6_738_415_616)
    much = forecast_memory(shape, num_trained=shape.num_parameters, tokens=16384, teacher=shape)
    less = forecast_memory(
        shape, num_trained=shape.num_parameters, tokens=16384, teacher=shape, checkpointing=True, num_shards=4
    )
    require_memory(much, much.total, "cuda:0", {})
    with pytest.raises(
        HeadwiseError, match=r"needs about \d+ GB of memory \(.*optimizer.*\), and cuda:0 has 80 GB"
    ):
        require_memory(much, 80 * 10**9, "cuda:0", {})
    with pytest.raises(HeadwiseError) as refused:
        require_memory(much, 80 * 10**9, "cuda:0", {"--launch fsdp2": less})
    assert refused.value.hint is not None and refused.value.hint.startswith("With --launch fsdp2 it needs ")


def test_a_run_is_forecast_from_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ModelFolder.of(open_checkpoint(EMBEDDED_MODEL))
    assert ModelShape.of_folder(folder).num_parameters == 4_541_184
    whole = memory.forecast_run(folder, folder, TRAINING, LENGTH)
    attention = replace(TRAINING, parameters="attention")
    assert memory.num_trained_parameters(folder, attention) == 5 * 4 * 256 * 256
    thin = replace(attention, lora=Lora(rank=4))
    assert memory.num_trained_parameters(folder, thin) == 5 * 8 * 4 * 256
    totals = [memory.forecast_run(folder, folder, part, LENGTH).total for part in (thin, attention)]
    assert totals[0] < totals[1] < whole.total
    alone = memory.forecast_run(folder, None, TRAINING, LENGTH)
    assert alone.teacher == 0 and alone.total < whole.total
    memory.check_memory(folder, folder, TRAINING, LENGTH)
    monkeypatch.setattr(memory, "free_device_memory", lambda *_: 10**8)
    with pytest.raises(HeadwiseError, match="this machine has 100 MB free"):
        memory.check_memory(folder, folder, TRAINING, LENGTH)


def test_free_memory_is_shared_by_the_processes_of_a_cpu() -> None:
    whole = memory.free_device_memory(torch.device("cpu"))
    share = memory.free_device_memory(torch.device("cpu"), 4)
    assert whole is not None and share is not None and share == pytest.approx(whole / 4, rel=0.2)
