"""Distillation: our trainer against a bare PyTorch loop on the same device, and a 7B student beside its 7B parent.

    python -m benchmarks.training                         speed, with the shape of the embedded model
    python -m benchmarks.training --shape 7b --steps 10   speed and memory of a 7B-shaped student and parent
    accelerate launch --config_file headwise/recipes/accelerate/fsdp2.yaml --num_processes 2 \
        -m benchmarks.training --shape 7b --steps 10 --batch 8192

Under FSDP2 the bare loop shards both models with `fully_shard`, layer by layer, and gathers weights in bfloat16.
Each loop prints a line of JSON when it is done.

Weights are random and made on the device. Both sides run the same student, the same teacher without gradients,
the same batches, bfloat16 products over float32 weights, gradient clipping and fused AdamW. A rate counts the
tokens that went through student and teacher, once. The bare loop is what one would write by hand: logits of both
in float32 at once, no logging, no checkpoints, no measurement.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, TrainerCallback

from headwise.text.packing import Collator
from headwise.train.memory import ModelShape, forecast_memory
from headwise.train.settings import Loss, Training
from headwise.train.teacher import Teacher
from headwise.train.trainer import Task, make_trainer

# Parents, the lengths and batches to train them with, and what their students are left with.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "config": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2},
        "heads": {"num_attention_heads": 4, "head_dim": 16, "rank": 16, "rope": 8, "groups": 2},
        "length": 64,
        "batch": 512,
        "micro": 256,
    },
    "small": {  # for memory on a CPU
        "config": {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
        "heads": {"num_attention_heads": 16, "head_dim": 64, "rank": 192, "rope": 64, "groups": 4},
        "length": 64,
        "batch": 128,
        "micro": 64,
    },
    "embedded": {
        "config": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5},
        "heads": {"num_attention_heads": 8, "head_dim": 32, "rank": 96, "rope": 32, "groups": 2},
        "length": 1024,
        "batch": 65536,
        "micro": 65536,
    },
    "7b": {  # Llama-2-7B
        "config": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
        "heads": {"num_attention_heads": 32, "head_dim": 128, "rank": 448, "rope": 64, "groups": 8},
        "length": 4096,
        "batch": 16384,
        "micro": 4096,
    },
}
LOSS = Loss(kl=0.9, cross_entropy=0.1)
WARM = 3  # steps before the clock starts


def configs(name: str, kind: str) -> tuple[Any, Any]:
    """The parent's config and the student's."""
    fields = {**SHAPES[name]["config"], "max_position_embeddings": SHAPES[name]["length"], "use_cache": False}
    heads = SHAPES[name]["heads"]
    count, size = heads["num_attention_heads"], heads["head_dim"]
    parent = LlamaConfig(**fields, num_attention_heads=count, num_key_value_heads=count, head_dim=size)
    if kind == "gqa":
        return parent, LlamaConfig(
            **fields, num_attention_heads=count, num_key_value_heads=heads["groups"], head_dim=size
        )
    return parent, DeepseekV3Config(
        **fields,
        num_attention_heads=count,
        num_key_value_heads=count,
        first_k_dense_replace=fields["num_hidden_layers"],
        q_lora_rank=None,
        kv_lora_rank=heads["rank"],
        qk_nope_head_dim=size,
        qk_rope_head_dim=heads["rope"],
        v_head_dim=size,
    )


def make(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The stock model with random weights, made on the device; an MLA one as it is trained, without latent norm."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if hasattr(config, "kv_lora_rank"):
        for layer in model.model.layers:
            layer.self_attn.kv_a_layernorm = torch.nn.Identity()
    return model


class Clock(TrainerCallback):
    """Seconds of the steps after the first few, and the peak of memory from the first on."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.seconds, self.losses = steps, 0.0, 0.0, []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        reset_peak()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM:
            self.started = now()
        if state.global_step == WARM + self.steps:
            self.seconds = now() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def ours(student: Any, teacher: Any, blocks: Tensor, training: Training, steps: int) -> dict[str, Any]:
    """`WARM + steps` steps of the trainer that recipes run on."""
    device = PartialState().device
    parent: Any = SimpleNamespace(load=lambda dtype: teacher, attention_paths={})
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            student,
            blocks,
            blocks[:1],
            training,
            Task(LOSS, Teacher(parent, device, training.compile)),
            Path(folder),
            length=blocks.shape[1],
            collate=Collator(False),
        )
        clock = Clock(steps)
        trainer.add_callback(clock)
        trainer.train()
    return {"seconds": clock.seconds / steps, "peak": peak(), "losses": [clock.losses[0], clock.losses[-1]]}


def bare(student: Any, teacher: Any, blocks: Tensor, training: Training, steps: int) -> dict[str, Any]:
    """The same steps written out."""
    assert training.micro_batch_tokens is not None
    device = next(student.parameters()).device
    if training.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if is_sharded():
        shard(student)
        shard(teacher)
    if training.compile:
        student.compile()
        teacher.compile()
    student.train()
    reset_peak()
    optimizer = torch.optim.AdamW(
        student.parameters(), training.learning_rate, tuple(training.betas), weight_decay=0.1, fused=True
    )
    processes = PartialState().num_processes
    rows = training.micro_batch_tokens // blocks.shape[1]
    micros = training.batch_tokens // training.micro_batch_tokens // processes
    blocks = blocks[PartialState().process_index :: processes]
    batches = iter(blocks.pin_memory().split(rows) if device.type == "cuda" else blocks.split(rows))
    started, losses = 0.0, []
    for step in range(1, WARM + steps + 1):
        total = torch.zeros((), device=device)
        for _ in range(micros):
            tokens = next(batches).to(device, non_blocking=True).long()
            with torch.no_grad():
                theirs = teacher(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu", cache_enabled=False):
                logits = student(input_ids=tokens, use_cache=False).logits[:, :-1]
            mine = logits.float().log_softmax(-1)
            divergence = functional.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1).mean()
            following = functional.nll_loss(mine.flatten(0, 1), tokens[:, 1:].flatten())
            loss = (LOSS.kl * divergence + LOSS.cross_entropy * following) / micros
            loss.backward()
            total += loss.detach()
            del theirs, logits, mine
        torch.nn.utils.clip_grad_norm_(student.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if step == WARM:
            started = now()
    seconds = now() - started
    return {"seconds": seconds / steps, "peak": peak(), "losses": [losses[0].item(), losses[-1].item()]}


def is_sharded() -> bool:
    return PartialState().distributed_type.name == "FSDP"


def shard(model: Any) -> None:
    """FSDP2 as one writes it by hand, layer by layer; weights travel in bfloat16, gradients in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def over_processes(run: dict[str, Any]) -> dict[str, Any]:
    """The slowest and largest process of a run."""
    runs = gather_object([run])
    return {**run, "seconds": max(r["seconds"] for r in runs), "peak": max(r["peak"] for r in runs)}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory, on Linux


def peak() -> int:
    """Bytes of the device that were allocated at once; on a CPU, resident with all else that the process holds."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def resident(line: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(row.split()[1] for row in status.splitlines() if row.startswith(line)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="embedded")
    parser.add_argument("--student", choices=("mla", "gqa"), default="mla")
    parser.add_argument("--steps", type=int, default=60, help="that are timed")
    parser.add_argument("--rounds", type=int, default=1, help="of ours and the bare loop in turn")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, help="tokens of a step")
    parser.add_argument("--micro", type=int, help="tokens at once")
    parser.add_argument("--no-bare", action="store_true")
    parser.add_argument("--shards-on-cpu", action="store_true", help="FSDP2 without GPUs, to try the command")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.checkpointing = options.shape in ("7b", "small")

    if options.shards_on_cpu:
        from tests.train.fsdp2_on_cpu import as_accelerators

        PartialState.__init__ = as_accelerators  # type: ignore[method-assign]
    processes = PartialState(cpu=not torch.cuda.is_available())
    device, shape = processes.device, SHAPES[options.shape]
    batch, micro = options.batch or shape["batch"], options.micro or shape["micro"]
    training = Training(
        tokens=(WARM + options.steps) * batch,
        batch_tokens=batch,
        micro_batch_tokens=micro,
        learning_rate=1e-5,
        gradient_checkpointing=options.checkpointing,
        compile=options.compile,
        log_every=5,
    )
    parent_config, student_config = configs(options.shape, options.student)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(
        3,
        parent_config.vocab_size,
        ((WARM + options.steps) * batch // shape["length"], shape["length"]),
        generator=generator,
        dtype=torch.int32,
    )
    bf16 = device.type != "cpu"
    measured: dict[str, list[dict[str, Any]]] = {}
    before = 0 if bf16 else resident("VmRSS")
    for _ in range(options.rounds):
        for name, loop in (("ours", ours), ("bare", bare)):
            if name == "bare" and options.no_bare:
                continue
            teacher = make(parent_config, device, torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
            student = make(student_config, device, torch.float32)
            numbers = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
            run = over_processes(loop(student, teacher, blocks, training, options.steps))
            measured.setdefault(name, []).append(run)
            if processes.is_main_process:
                print(json.dumps({"loop": name, "processes": processes.num_processes, **run}), flush=True)
            del student, teacher
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    count = processes.num_processes
    num_shards = count if is_sharded() else 1
    expected = forecast_memory(
        ModelShape.of(student_config, numbers[0]),
        num_trained=numbers[0],
        tokens=min(micro, batch // count),
        teacher=ModelShape.of(parent_config, numbers[1]),
        bf16=bf16,
        checkpointing=options.checkpointing,
        num_shards=num_shards,
        num_replicas=1 if num_shards > 1 else count,
        accumulates=batch // count > micro,
    )
    if not processes.is_main_process:
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    forecast = expected.total - (0 if bf16 else expected.overhead)
    print(json.dumps({"forecast": forecast, "parameters": numbers, "device": where}), flush=True)
    print(f"{options.shape} {options.student}: {numbers[0]:,} parameters beside {numbers[1]:,}, {count} x {where}")
    rates = {name: batch / statistics.median(r["seconds"] for r in runs) for name, runs in measured.items()}
    for name, runs in measured.items():
        most, losses = max(run["peak"] for run in runs), runs[0]["losses"]
        print(f"  {name}: {rates[name]:>12,.0f} tokens/s, peak {(most - before) / 1e9:.2f} GB, loss {losses}")
    if "bare" in rates:
        print(f"  ours / bare: {rates['ours'] / rates['bare']:.3f}")
    print(f"  forecast: {forecast / 1e9:.2f} GB")
    if options.json:
        report = {"device": where, "processes": count, "torch": torch.__version__, "measured": measured}
        report |= {"options": {k: str(v) for k, v in vars(options).items()}, "forecast": asdict(expected)}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
