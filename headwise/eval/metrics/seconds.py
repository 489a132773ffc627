"""Forecast the time of an evaluation before its work, from the questions, the parameters and the device's speed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from headwise import compat
from headwise.eval import processes
from headwise.eval.metrics.inputs import EvalInputs
from headwise.eval.model import EvalModel
from headwise.eval.settings import EvalRecipe, EvalSettings

# Questions of a task whose length is measured.
SAMPLED = 8
# Share of the speed of one matrix product that a forward pass reaches, bytes of weights that a second reads, and
# the least time of a decoding step of a layer. Those of the CPU are on the low side of two measured models, of 4.5M
# and 135M parameters; those of a GPU are estimates.
EFFICIENCY = {"cpu": 0.5, "cuda": 0.25}
BYTES_PER_SECOND = {"cpu": 1e10, "cuda": 2e12}
SECONDS_PER_LAYER = {"cpu": 5e-4, "cuda": 1e-3}
# Statistics, pictures and the report.
REST_SECONDS = 8.0
# A token costs more where layers are compared: attention returns its weights, whose entropy is measured.
DIAGNOSTICS = 2
MEASURED_SECONDS = 1.0
FILE_RATE = 2.5e9
# Tokens of an answer in free text that names no other number.
ANSWER_TOKENS = 256


def forecast_seconds(
    recipe: EvalRecipe,
    settings: EvalSettings,
    tasks: Iterable[Any],
    inputs: EvalInputs,
    models: Iterable[EvalModel],
    tokenizer: Any,
) -> float | None:
    """Forecast the time of the measurements.

    The speed of the device is that of a second of matrix products now, so that other programs on the machine count.

    Args:
        recipe: what is measured.
        settings: resolved settings.
        tasks: loaded tasks of lm-eval.
        inputs: text and prompts.
        models: those that are measured.
        tokenizer: of all models.

    Returns:
        The seconds; None where a model's number of parameters or a task's questions are unknown.
    """
    models = list(models)
    if any(model.subject.parameters is None for model in models):
        return None
    kind = torch.device(str(settings.device)).type
    read = steps = 0.0
    try:
        for answered, written in _task_tokens(tasks, settings, tokenizer):
            read, steps = read + answered, steps + written
    except Exception:  # a task's own code; the evaluation itself names the error
        return None
    read += sum(text.numel() for text in (inputs.blocks, inputs.windows) if text is not None)
    if inputs.pairs is not None:
        read += inputs.pairs.sources.numel() + inputs.pairs.targets.numel()
    if inputs.images is not None:
        read += len(inputs.images) * inputs.images[0].tokens.numel() * (1 + DIAGNOSTICS * (len(models) == 2))
    if inputs.prompts is not None:
        read += inputs.prompts.numel() + len(inputs.prompts) * inputs.new_tokens
        steps += inputs.new_tokens
    loads = 1 + bool(recipe.tasks)
    if len(models) == 2 and recipe.needs_both_models:
        loads += 1
        if recipe.diagnostics is not None and inputs.blocks is not None:
            read += DIAGNOSTICS * recipe.diagnostics.blocks * inputs.blocks.shape[1]
        if recipe.acceptance is not None:
            read += recipe.acceptance.prompts * recipe.acceptance.new_tokens
            steps += recipe.acceptance.prompts * recipe.acceptance.new_tokens / 2
    rate = _matrix_rate(settings) * EFFICIENCY.get(kind, EFFICIENCY["cuda"])
    total = REST_SECONDS
    for model in models:
        parameters = model.subject.parameters or 0
        layers = getattr(model.text_config, "num_hidden_layers", 0)
        step = 2 * parameters / BYTES_PER_SECOND.get(kind, BYTES_PER_SECOND["cuda"])
        step += layers * SECONDS_PER_LAYER.get(kind, SECONDS_PER_LAYER["cuda"])
        total += 2 * parameters * read / rate / processes.num_processes()
        total += steps * step + loads * 2 * parameters / FILE_RATE
    return total


def _task_tokens(tasks: Iterable[Any], settings: EvalSettings, tokenizer: Any) -> Iterator[tuple[float, float]]:
    """Yield the tokens that a model reads for each task, and its decoding steps, from a few of the questions."""
    for task in _single_tasks(tasks):
        count = compat.lm_eval_num_questions(task, settings.limit)
        questions = [task.eval_docs[place] for place in range(min(SAMPLED, count))]
        shots = 1 + (settings.num_fewshot or task.config.num_fewshot or 0)
        read = written = 0.0
        for question in questions:
            asked = len(tokenizer(str(task.doc_to_text(question)))["input_ids"]) * shots
            if task.OUTPUT_TYPE == "multiple_choice":
                choices = task.doc_to_choice(question)
                read += sum(asked + len(tokenizer(str(choice))["input_ids"]) for choice in choices)
            elif task.OUTPUT_TYPE == "generate_until":
                read += asked
                kwargs = task.config.generation_kwargs or {}
                written += kwargs.get("max_gen_toks", ANSWER_TOKENS)
            else:
                read += asked + len(tokenizer(str(task.doc_to_target(question)))["input_ids"])
        share = count / max(1, len(questions))
        batch = settings.batch_size if isinstance(settings.batch_size, int) else 16
        yield read * share, written * share / batch


def _single_tasks(tasks: Iterable[Any]) -> Iterator[Any]:
    for task in tasks:
        yield from _single_tasks(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else (task,)


def _matrix_rate(settings: EvalSettings) -> float:
    """Measure the operations in a second of matrix products on the device, in the dtype of the evaluation.

    A second of them includes the waits for other programs, which one product does not meet.
    """
    device = torch.device(str(settings.device))
    dtype = getattr(torch, str(settings.dtype), torch.float32 if device.type == "cpu" else torch.bfloat16)
    size = 512 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    (a @ a)[0, 0].item()  # the first product loads libraries
    products, start = 0, time.perf_counter()
    while time.perf_counter() - start < MEASURED_SECONDS:
        (a @ a)[0, 0].item()
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - start)
