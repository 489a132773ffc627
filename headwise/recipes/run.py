"""One run of `headwise uptrain`, from opened folders to a published one.

    folder -> student (-> layer by layer) (-> the Trainer) -> stock tensors -> verified folder

Every process of a distributed run goes through it; the first one holds the output folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.io.tokenizer import load_tokenizer
from headwise.io.workdir import WorkFolder
from headwise.io.writer import OutputTensor, Writer
from headwise.measure.loss import nats_per_token
from headwise.progress import Progress
from headwise.recipes import outcome
from headwise.recipes.compatibility import check_fit
from headwise.recipes.layerwise import train_layers
from headwise.recipes.settings import Recipe
from headwise.records.manifest import read_record
from headwise.text import blocks as data
from headwise.text import packing
from headwise.train.callbacks import check_reporters
from headwise.train.checkpoints import Checkpoints, keep, put
from headwise.train.curve_plot import draw_curve
from headwise.train.guard import Stopper
from headwise.train.memory_check import check_memory
from headwise.train.student import ModelFolder, Student
from headwise.train.teacher import Teacher, answers
from headwise.train.trainer import Task, make_trainer, on_cpu, resume, with_answers

TRAINING = "training"


@dataclass(frozen=True)
class Uptrained:
    """A finished run. Losses are nats per token on the held-out text.

    Attributes:
        out: the folder.
        before, parent: of the folder it started from, and of its teacher (None where there is none).
        after: of the folder that was written.
        tokens, seconds: of the training, end to end; `layers` has the layerwise stage's errors.
    """

    out: Path
    recipe: str
    before: float
    after: float
    parent: float | None
    tokens: int
    seconds: float
    layers: dict[int, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


class Run:
    """One run, from opened folders to a published one."""

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        folder: ModelFolder,
        teacher: str | Path | None,
        out: Path,
        command: str,
        progress: Progress,
    ) -> None:
        self.recipe, self.name, self.folder, self.out = recipe, name, folder, out
        self.command, self.progress = command, progress
        self.processes = PartialState(cpu=on_cpu())
        self.main, self.device = self.processes.is_main_process, self.processes.device
        if recipe.init is not None:
            raise HeadwiseError(
                "This recipe makes a model from nothing.", "python -m headwise.recipes.worker runs it."
            )
        self.record = read_record(folder.checkpoint.folder)
        parent = teacher if teacher is not None else outcome.recorded_source(self.record, folder.checkpoint)
        self.teacher = ModelFolder.of(open_checkpoint(parent, progress=progress)) if parent is not None else None
        self.tokenizer = load_tokenizer(folder.checkpoint.folder, folder.checkpoint.source)
        check_fit(recipe, folder, self.teacher, self.tokenizer, self.record)
        check_memory(folder, self.teacher, recipe)
        check_reporters(recipe.train.report_to if recipe.train else [])
        self.home = WorkFolder(out).home / TRAINING
        self.before, self.parent = math.nan, None  # type: float, float | None
        self.heldout = torch.empty(0)
        self.layers: dict[int, dict[str, Any]] = {}
        self.steps, self.seconds = 0, 0.0
        self.text: Mapping[str, Any] = {}

    def __call__(self, *, resume: bool, force: bool, max_shard_size: int | str) -> Uptrained | None:
        outputs = [OutputTensor(e.name, e.dtype, e.shape, e.name) for e in self.folder.checkpoint.tensors.values()]
        with ExitStack() as stack:
            writer = None
            if self.main:
                writer = Writer(
                    self.out,
                    outputs,
                    identity=self._identity(),
                    source=self.folder.checkpoint.folder if self.folder.checkpoint.revision is None else None,
                    max_shard_size=max_shard_size,
                    resume=resume,
                    force=force,
                )
                stack.enter_context(writer)
                outcome.begin(writer, self.home)
            self.processes.wait_for_everyone()
            self.progress.stage(f"reading {self.recipe.data.heldout}")
            self.heldout = self.heldout_blocks()
            self._measure_ends(writer)
            student = Student.load(self.folder, self.teacher)
            if self.recipe.layerwise is not None:
                self._layer_by_layer(student, writer)
            student.choose(self.recipe.train)
            state = self._train(student) if self.recipe.train is not None else student.network.state_dict()
            if writer is None:
                return None
            return self._publish(writer, student, state)

    def heldout_blocks(self) -> Tensor:
        """The text that measures progress, int64 (blocks, length)."""
        held = self.recipe.data
        return data.blocks_from(
            held.heldout, self.tokenizer, split="heldout", length=held.length, count=held.heldout_blocks
        )

    def training_blocks(self, tokens: int, seed: int) -> tuple[Any, Mapping[str, Any]]:
        """The text that is trained on: see `data.training_blocks`."""
        return data.training_blocks(self.recipe.data, self.tokenizer, tokens, seed)

    def _identity(self) -> dict[str, Any]:
        teacher = self.teacher.checkpoint.fingerprint() if self.teacher else None
        return {
            "source": self.folder.checkpoint.fingerprint(),
            "teacher": teacher,
            "recipe": asdict(self.recipe),
            "torch": torch.__version__,
        }

    def _measure_ends(self, writer: Writer | None) -> None:
        """The loss before training, and the parent's; a resumed run remembers them."""
        if writer is None:
            return
        if "nats" not in writer.notes:
            self.progress.stage("measuring")
            ends = [self._nats(self.folder), self._nats(self.teacher) if self.teacher else None]
            writer.note("nats", ends)
        self.before, self.parent = writer.notes["nats"]

    def _nats(self, folder: ModelFolder) -> float:
        """Nats per token of a folder's stock model on the held-out text."""
        network = folder.load(torch.float32 if on_cpu() else torch.bfloat16).to(self.device)
        return nats_per_token(network, self.heldout).nats

    def _layer_by_layer(self, student: Student, writer: Writer | None) -> None:
        assert self.recipe.layerwise is not None and self.teacher is not None
        done = self.home / "layers.safetensors"
        if self.main and writer is not None and not done.exists():
            wanted = self.recipe.layerwise.tokens
            blocks, _ = self.training_blocks(wanted, self.recipe.seed + 1)
            if not isinstance(blocks, Tensor):
                blocks = torch.stack(list(islice(blocks, wanted // self.recipe.data.length)))
            blocks = blocks[: max(2, wanted // self.recipe.data.length)]
            self.layers = train_layers(
                student,
                self.teacher,
                self.recipe.layerwise,
                blocks,
                self.device,
                seed=self.recipe.seed,
                progress=self.progress,
            )
            writer.note("layers", {str(layer): report for layer, report in self.layers.items()})
            keep(student.network.state_dict(), student.attention_parameters(), done)
        elif writer is not None:
            self.layers = {int(layer): report for layer, report in writer.notes["layers"].items()}
        self.processes.wait_for_everyone()
        put(student.network, done)

    def _train(self, student: Student) -> dict[str, Tensor]:
        """The network's state dict after the Trainer has been at it."""
        recipe, training = self.recipe, self.recipe.train
        assert training is not None
        tokens = training.budget(outcome.pretraining_tokens(self.teacher, self.folder))
        self.progress.stage(f"reading {', '.join(recipe.data.text)}")
        # Whole steps of text and no more: the order of rows follows their number.
        wanted = math.ceil(tokens / training.batch_tokens) * training.batch_tokens
        blocks, self.text = self.training_blocks(wanted, training.seed)
        if isinstance(blocks, Tensor):
            blocks = blocks[: wanted // recipe.data.length]
        collate: Any = packing.collator(student.bare, self.tokenizer, recipe.data.separate_documents)
        beside = None
        if recipe.loss.needs_teacher and recipe.teacher.topk is not None:
            assert self.teacher is not None
            if not isinstance(blocks, Tensor):
                raise HeadwiseError(
                    "A teacher's answers are written for text that is read at once, and this text is streamed.",
                    "Leave out teacher.topk, or give files.",
                )
            topk = min(recipe.teacher.topk, self.teacher.text.vocab_size)
            blocks = answers(
                self.teacher,
                blocks,
                collate,
                topk=topk,
                temperature=recipe.loss.temperature,
                home=self.home,
                progress=self.progress,
            )
            collate = with_answers(collate)
        elif recipe.loss.needs_teacher:
            assert self.teacher is not None
            beside = Teacher(self.teacher, self.device, training.compile)
        trained = {name: p.numel() for name, p in student.trained().items()}
        checkpoints = Checkpoints(
            self.home,
            trained,
            keep=training.keep,
            export=lambda state, to: outcome.write_model(student, state, to),
            nbytes=self.folder.checkpoint.nbytes,
        )
        if self.main:
            checkpoints.check_space()
        last = checkpoints.last
        if last is not None:
            checkpoints.load(student.network, last)
        scales = student.scales(self.teacher) if self.teacher else (1.0, 1.0)
        trainer = make_trainer(
            student.network,
            blocks,
            self.heldout,
            recipe,
            self.home,
            self.progress,
            task=Task(recipe.loss, beside, scales, student.attention),
            collate=collate,
            checkpoints=checkpoints,
            tokens=tokens,
            figures={"parent": self.parent, "before": self.before},
        )
        stopper = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Stopper))
        started = time.monotonic()
        try:
            resume(trainer, last)
        finally:
            stopper.restore()
        self.seconds, self.steps = time.monotonic() - started, trainer.state.global_step
        if stopper.stopped and self.steps < trainer.state.max_steps:
            raise KeyboardInterrupt
        return trainer.state_dict()

    def _publish(self, writer: Writer, student: Student, state: dict[str, Tensor]) -> Uptrained:
        checkpoint = self.folder.checkpoint
        self.progress.stage("writing", total=checkpoint.nbytes, unit="bytes")
        student.free()  # its memory is needed for what was written
        for name, tensor in student.export(state):
            if name not in writer.done:
                writer.write(name, tensor)
                self.progress.advance(tensor.nbytes)
        for name in checkpoint.tensors:
            if name not in writer.done:
                writer.copy(name, checkpoint)
        checkpoint.check_unchanged()
        found: dict[str, float] = {}

        def check(folder: Path) -> None:
            written = ModelFolder.of(open_checkpoint(folder))
            found["after"] = self._nats(written)
            outcome.describe(writer, self._facts(found["after"]), self.record, checkpoint)

        if (curve := self.home / "curve.csv").exists():
            draw_curve(curve, curve.with_suffix(".png"), parent=self.parent, title=f"Uptraining: {self.name}")
        outcome.add_files(writer, checkpoint, self.home)
        out = writer.publish(check)
        self.progress.finish()
        tokens = self.steps * self.recipe.train.batch_tokens if self.recipe.train else 0
        after, seconds = found["after"], round(self.seconds, 1)
        return Uptrained(out, self.name, self.before, after, self.parent, tokens, seconds, self.layers)

    def _facts(self, after: float) -> dict[str, Any]:
        """What headwise.json and the card say of this run."""
        training, held = self.recipe.train, self.recipe.data
        return {
            "command": self.command,
            "recipe": self.name,
            "settings": json.loads(json.dumps(asdict(self.recipe))),
            "teacher": outcome.name_of(self.teacher.checkpoint) if self.teacher else None,
            "text": {name: dict(found) for name, found in self.text.items()},
            "tokens": self.steps * training.batch_tokens if training else 0,
            "layerwise": {str(layer): report for layer, report in self.layers.items()},
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "hardware": outcome.hardware(),
            "versions": outcome.versions(),
            "heldout": {"text": held.heldout, "tokens": self.heldout[:, 1:].numel()},
            "nats": {"parent": self.parent, "before": self.before, "after": after},
        }
