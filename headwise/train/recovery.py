"""Recover the attention layers of a converted model together, on text sampled from the parent (mathematics, 7b).

Two stages, each with transformers' Trainer. First a regression of all layers at once: every attention layer of the
student gets the parent's own inputs of that layer and is trained on the parent's outputs. Then the KL divergence
from the parent, end to end. Where the memory does not hold that, windows of decoder layers get the parent's hidden
states in its place. Only attention is trained. A stage that raises the held-out loss is undone.
"""

from __future__ import annotations

import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.cuda import record
from headwise.io.fs import DiskError
from headwise.io.workdir import write_file_atomically
from headwise.models.stock import empty_model, layer_arguments, move_to_device
from headwise.progress import SILENT, Progress
from headwise.train.callbacks import Diverged
from headwise.train.checkpoints import WEIGHTS, Checkpoints, load_tensors, save_tensors
from headwise.train.launch import average_gradients, same_everywhere
from headwise.train.optimizer import RelativeAdam
from headwise.train.settings import Loss, Training
from headwise.train.student import ModelFolder, Student
from headwise.train.teacher import Teacher
from headwise.train.trainer import Task, Trainer, make_trainer, process_state, resume

# Peak learning rates, relative to the size of each weight (mathematics, section 7b).
REGRESSION_RATE, SETTLED = 0.1, {"mla": 1000, "gqa": 1}  # below SETTLED steps the rate is in proportion to them
WINDOW_RATE = {"mla": 0.003, "gqa": 0.02}
KL_RATE = {"mla": 0.003, "gqa": 0.008}
# The most decoder layers of a window, and the energy of bfloat16's rounding over that of a hidden state.
WINDOW, ROUNDING = 4, 2.0**-16
WARMUP = 0.1
RECORDED_ON = ("cuda",)  # devices that repeat a recorded step
# Checkpoints of a stage, and the file of its result.
CHECKPOINTS, REPORT = 4, "report.json"


@dataclass(frozen=True)
class JointPlan:
    """How much of what a joint recovery does.

    Attributes:
        tokens: distinct tokens of text.
        regression_steps: of the first stage.
        kl_steps: of the KL divergence, end to end.
        windows_steps: of the training in windows, which takes the place of the KL divergence where memory is short.
        sequences: in one step.
        length: tokens in a sequence, a multiple of `sampled_length`.
        sampled_length: tokens that are sampled in one piece.
        repeats: share of the sequences in which earlier passages are repeated.
        heldout: sampled pieces that only measure.
        one_by_one: whether the sequences of a step are read one after the other, in less memory. On a CPU they are.
    """

    tokens: int
    regression_steps: int
    kl_steps: int
    windows_steps: int = 0
    sequences: int = 3
    length: int = 4096
    sampled_length: int = 1024
    repeats: float = 0.2
    heldout: int = 32
    one_by_one: bool = False

    @property
    def num_sampled(self) -> int:
        """Sampled pieces of training text."""
        return max(self.sequences * self.length, self.tokens) // self.sampled_length


@dataclass(frozen=True)
class StageReport:
    """One stage of a joint recovery.

    Attributes:
        stage: "regression", "windows" or "kl".
        steps: of the optimizer.
        tokens: read, repeats included.
        before: held-out loss before, nats per token.
        after: held-out loss after; None: it was not finite.
        kept: whether the stage's weights are used; False where the loss rose.
    """

    stage: str
    steps: int
    tokens: int
    before: float
    after: float | None
    kept: bool


class RecordedTrainer(Trainer):
    """On a GPU, record the forward and backward passes of a step, and repeat them as a CUDA graph.

    All batches have one shape. Without a graph the many small kernels of attention wait for Python. Processes that
    train together average gradients here: accelerate's wrapper sees neither a graph nor single layers.
    """

    _repeat: Callable[[], Any] | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **options: Any) -> Tensor:
        """Compute the gradients of a batch, and return its loss.

        Args:
            model: the network.
            inputs: the batch.
            others: further arguments of the Trainer.
            options: further arguments of the Trainer.
        """
        batch: dict[str, Any] = self._prepare_inputs(inputs)
        device = self.args.device
        network = self.accelerator.unwrap_model(model)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if device.type not in RECORDED_ON or self.args.gradient_accumulation_steps > 1:
            loss = self.compute_gradients(network, batch, *others, **options)
            if self.accelerator.sync_gradients:
                average_gradients(parameters)
            return loss
        if self._repeat is None:
            self._batch = {name: tensor.clone() for name, tensor in batch.items()}
            self._gradients = [torch.zeros_like(parameter) for parameter in parameters]

            def step() -> None:
                self._reset_gradients(parameters)
                self._loss = self.compute_gradients(network, dict(self._batch))

            self._repeat = record(step, device)
        for name, tensor in self._batch.items():
            tensor.copy_(batch[name])
        self._repeat()
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient  # the Trainer drops it after each step, and a graph writes to the same memory
        average_gradients(parameters)
        return self._loss.clone()

    def _reset_gradients(self, parameters: list[nn.Parameter]) -> None:
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def compute_gradients(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **options: Any) -> Tensor:
        """Run the forward and backward passes of a batch, and return its loss.

        Args:
            model: the network.
            inputs: the batch, on the device.
            others: further arguments of the Trainer.
            options: further arguments of the Trainer.
        """
        return super().training_step(model, inputs, *others, **options)


@dataclass(frozen=True)
class Part:
    """Modules that follow each other, and are trained apart from the rest of the model.

    Attributes:
        first: the teacher's module whose input the part gets.
        last: the teacher's module whose output is the target.
        modules: the student's modules, with the arguments of each besides its input.
    """

    first: nn.Module
    last: nn.Module
    modules: list[tuple[nn.Module, dict[str, Any]]]


class ForcedTrainer(RecordedTrainer, ABC):
    """Train parts of the student, each on the teacher's input and output of the same part.

    The gradient of a part is computed inside the teacher's forward pass, so the graph of one part is in memory.
    """

    longest = 1  # the most layers of a part

    def prepare_parts(self, student: Student, length: int) -> None:
        """Find the parts.

        Args:
            student: the model in training.
            length: tokens in a sequence.
        """
        assert self.task.teacher is not None
        teacher, stock = self.task.teacher, student.folder.stock
        device = next(student.network.parameters()).device
        skeleton = empty_model(student.folder.checkpoint.config, stock.auto_class)
        arguments = layer_arguments(skeleton, stock.module, length, torch.float32)
        ours = self.modules(student.network, student.folder)
        theirs = self.modules(teacher.network, teacher.folder)
        self._parts = [
            Part(
                theirs[run[0]],
                theirs[run[-1]],
                [(ours[layer], move_to_device(arguments[layer], device)) for layer in run],
            )
            for run in even_runs(list(ours), self.longest)
            if any(parameter.requires_grad for layer in run for parameter in ours[layer].parameters())
        ]

    @staticmethod
    @abstractmethod
    def modules(network: Any, folder: ModelFolder) -> dict[int, nn.Module]:
        """Return the modules that parts are made of, by layer.

        Args:
            network: the model.
            folder: where it comes from.
        """

    @abstractmethod
    def error(self, part: Callable[[Tensor], Tensor], given: Tensor, expected: Tensor) -> Tensor:
        """Return the relative error of a part's output.

        Args:
            part: the student's part.
            given: the teacher's input, (sequences, tokens, width).
            expected: the teacher's output, of the same shape.
        """

    def compute_gradients(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Return the mean relative error of all parts; their gradients are accumulated.

        Args:
            model: the network; its own forward pass is not run.
            inputs: the batch, on the device.
        """
        assert self.task.teacher is not None
        tokens = inputs["input_ids"]
        errors: list[Tensor] = []
        given: list[Tensor] = []
        share = 1 / (len(self._parts) * self.args.gradient_accumulation_steps)

        def enter(module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
            given.append(options["hidden_states"] if "hidden_states" in options else arguments[0])

        def hook_for(part: Part) -> Any:
            def run(hidden: Tensor) -> Tensor:
                for module, options in part.modules:
                    output = module(hidden_states=hidden, **options)
                    hidden = output[0] if isinstance(output, tuple) else output
                return hidden.float()

            def leave(module: nn.Module, arguments: Any, output: Any) -> None:
                expected = (output[0] if isinstance(output, tuple) else output).float()
                with (
                    torch.enable_grad(),
                    torch.autocast(tokens.device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=False),
                ):
                    error = self.error(run, given.pop().float(), expected)
                    self.accelerator.backward(error * share)
                errors.append(error.detach())

            return leave

        with ExitStack() as hooks, torch.no_grad():
            for part in self._parts:
                hooks.callback(part.first.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(part.last.register_forward_hook(hook_for(part)).remove)
            network: Any = self.task.teacher.network
            network.base_model(input_ids=tokens, use_cache=False)
        return torch.stack(errors).mean() / self.args.gradient_accumulation_steps


class RegressionTrainer(ForcedTrainer):
    """Train every attention layer alone, by its output's error over the output's energy."""

    @staticmethod
    def modules(network: Any, folder: ModelFolder) -> dict[int, nn.Module]:
        """Return the attention modules by layer.

        Args:
            network: the model.
            folder: where it comes from.
        """
        return {layer: network.get_submodule(path) for layer, path in folder.attention_paths.items()}

    def error(self, part: Callable[[Tensor], Tensor], given: Tensor, expected: Tensor) -> Tensor:
        """Return the squared error of the output over its energy.

        Args:
            part: the student's attention.
            given: the teacher's input, (sequences, tokens, width).
            expected: the teacher's output, of the same shape.
        """
        expected = expected * self.task.scales[1]
        return (part(given) - expected).square().mean() / expected.square().mean().clamp_min(1e-12)


class WindowTrainer(ForcedTrainer):
    """Train windows of decoder layers on the teacher's hidden states before and after them."""

    longest = WINDOW

    @staticmethod
    def modules(network: Any, folder: ModelFolder) -> dict[int, nn.Module]:
        """Return the decoder layers.

        Args:
            network: the model.
            folder: where it comes from.
        """
        return dict(enumerate(network.get_submodule(folder.stock.module.rpartition(".")[0])))

    def error(self, part: Callable[[Tensor], Tensor], given: Tensor, expected: Tensor) -> Tensor:
        """Return the squared error of a token's hidden state over the energy of the parent's update, as a mean.

        Args:
            part: the student's layers.
            given: the teacher's hidden state before them, (sequences, tokens, width).
            expected: the teacher's hidden state after them, of the same shape.
        """
        scale = self.task.scales[0]
        rounding = ROUNDING * expected.square().sum(-1)
        energy = torch.maximum((expected - given).square().sum(-1), rounding).clamp_min(1e-12)
        return ((part(given * scale) / scale - expected).square().sum(-1) / energy).mean()


def even_runs(layers: list[int], longest: int) -> list[list[int]]:
    """Return the layers in runs of nearly one length.

    Args:
        layers: their numbers.
        longest: the most layers of a run.
    """
    return [run.tolist() for run in torch.tensor(layers).tensor_split(math.ceil(len(layers) / longest))]


# The trainer of every stage, and its name for the progress.
STAGES: dict[str, tuple[type[Trainer], str]] = {
    "regression": (RegressionTrainer, "Regression of all layers"),
    "windows": (WindowTrainer, f"Windows of {WINDOW} layers"),
    "kl": (RecordedTrainer, "KL to the parent"),
}


def recover_jointly(
    student: Student,
    parent: ModelFolder,
    blocks: Tensor,
    heldout: Tensor,
    plan: JointPlan,
    work: Path,
    *,
    seed: int = 0,
    device: torch.device,
    progress: Progress = SILENT,
) -> list[StageReport]:
    """Train the attention of a student in place.

    A call with the files of an interrupted one in `work` continues it. Processes that joined share every step.

    Args:
        student: loaded from its folder; its attention has closed-form weights.
        parent: the model that it was converted from.
        blocks: training text, int64 (sequences, length).
        heldout: text that measures, int64 (sequences, any length).
        plan: steps of both stages.
        work: a folder for curves, checkpoints and results of the stages.
        seed: of the order of the text.
        device: where the models are trained.
        progress: receives the figures of both stages.

    Returns:
        A report for each stage.

    Raises:
        SettingError: the text does not fill one step.
        KeyboardInterrupt: a signal stopped a stage; its checkpoint is written.
    """
    kind = "mla" if student.folder.is_latent else "gqa"
    process_state(device.type if device.type == "cpu" else None)  # in a group of processes it selects the GPU
    device = torch.device(device.type)  # the Trainer has one accelerator: that of the group, or the first
    teacher = Teacher(parent, device)
    return [
        _run_stage(stage, steps, rate, student, teacher, blocks, heldout, plan, work / stage, seed, progress)
        for stage, steps, rate in (
            ("regression", plan.regression_steps, REGRESSION_RATE * min(1, plan.regression_steps / SETTLED[kind])),
            ("windows", plan.windows_steps, WINDOW_RATE[kind]),
            ("kl", plan.kl_steps, KL_RATE[kind]),
        )
        if steps
    ]


def _run_stage(
    stage: str,
    steps: int,
    rate: float,
    student: Student,
    teacher: Teacher,
    blocks: Tensor,
    heldout: Tensor,
    plan: JointPlan,
    work: Path,
    seed: int,
    progress: Progress,
) -> StageReport:
    """Run one stage, or load the result of a finished one. A stage resumes from its last checkpoint."""
    trainer_class, title = STAGES[stage]
    cpu = teacher.device.type == "cpu"
    tokens = steps * plan.sequences * plan.length
    training = Training(
        tokens=tokens,
        parameters="attention",
        batch_tokens=plan.sequences * plan.length,
        micro_batch_tokens=plan.length if cpu or plan.one_by_one else None,
        learning_rate=rate,
        warmup=WARMUP,
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_every=max(1, steps // CHECKPOINTS),
        precision="float32" if cpu else "bf16",
        seed=seed,
    )
    student.select_parameters(training)
    trained = student.trained_parameters()
    report_file, weights = work / REPORT, work / WEIGHTS
    if report_file.exists():
        load_tensors(student.network, weights)
        return StageReport(**json.loads(report_file.read_text()))
    work.mkdir(parents=True, exist_ok=True)
    checkpoints = _checkpoints(work, trained)
    task = Task(Loss(kl=1.0), teacher, student.scales(teacher.folder), student.attention_paths)
    trainer = make_trainer(
        student.network,
        blocks,
        heldout,
        training,
        task,
        work,
        progress,
        length=plan.length,
        collate=_collate,
        checkpoints=checkpoints,
        trainer_class=trainer_class,
        device=teacher.device.type,
    )
    parameters = list(trained.values())
    trainer.optimizer = RelativeAdam(parameters, lr=rate)
    if isinstance(trainer, ForcedTrainer):
        trainer.prepare_parts(student, plan.length)
    start = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    before = trainer.measure(student.network)
    progress.stage(title, total=steps)
    last = checkpoints.last if checkpoints else None
    if checkpoints and last:
        checkpoints.load(student.network, last)
    with suppress(Diverged):  # its loss is measured, and the stage is undone
        resume(trainer, last)
    loss = trainer.measure(student.network)
    after = loss if math.isfinite(loss) else None
    report: StageReport = same_everywhere(
        StageReport(stage, steps, tokens, before, after, kept=after is not None and after < before)
    )
    if not report.kept:
        with torch.no_grad():
            for parameter, old in zip(parameters, start, strict=True):
                parameter.copy_(old)
    if trainer.args.should_save:
        save_tensors(student.network.state_dict(), trained, weights)
        write_file_atomically(report_file, json.dumps(asdict(report)).encode())
        for checkpoint in checkpoints.all() if checkpoints else ():
            shutil.rmtree(checkpoint)
    return report


def _checkpoints(work: Path, trained: Mapping[str, nn.Parameter]) -> Checkpoints | None:
    """Return the checkpoints of a stage; None without room: an interrupted stage then begins again."""
    checkpoints = Checkpoints(work, {name: p.numel() for name, p in trained.items()}, num_kept=1)
    room = True
    try:
        checkpoints.check_space()
    except DiskError:
        room = False
    return checkpoints if same_everywhere(room) else None


def as_records(reports: list[StageReport]) -> list[dict[str, Any]]:
    """Return the reports as plain data, for headwise.json."""
    return [asdict(report) for report in reports]


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    tokens = torch.stack([row.long() for row in rows])
    labels = tokens.clone()
    labels[:, 0] = -100
    return {"input_ids": tokens, "labels": labels}
