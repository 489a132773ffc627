"""Run one uptraining, from opened folders to a published one.

    folder -> student (-> layer by layer) (-> the Trainer) -> stock tensors -> verified folder

Every process of a distributed run executes it; the first one writes the output folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise import environment
from headwise.convert.sample import write_samples
from headwise.errors import HeadwiseError, SettingError
from headwise.format import public_data, public_text
from headwise.io.reader import open_checkpoint
from headwise.io.tokenizer import load_tokenizer
from headwise.io.workdir import WorkFolder
from headwise.io.writer import Writer
from headwise.measure.loss import nats_per_token, num_predicted
from headwise.progress import SILENT, Progress
from headwise.recipes import outcome
from headwise.recipes.compatibility import check_compatible
from headwise.recipes.layerwise import train_layers
from headwise.recipes.settings import UptrainRecipe
from headwise.records.manifest import read_record
from headwise.records.parent import recorded_source
from headwise.text import packing
from headwise.text.blocks import blocks_from, training_blocks
from headwise.text.marks import tokens_of
from headwise.text.pairs import Pairs, collate_pairs, encode_pairs, require_pairs, training_pairs
from headwise.text.sources import SELF
from headwise.train.callbacks import check_reporters, gap_closed
from headwise.train.checkpoints import WEIGHTS, Checkpoints, load_tensors, save_tensors
from headwise.train.curve_plot import draw_curve
from headwise.train.memory import check_memory
from headwise.train.settings import Training
from headwise.train.student import ModelFolder, Student
from headwise.train.teacher import Teacher, cache_teacher_topk
from headwise.train.trainer import Task, collate_topk, make_trainer, process_state, resume

TRAINING = "training"
# A learning rate is high when it is this many times the usual one for the size of the model.
HIGH_RATE = 5
SELF_FILE = "self.jsonl"
SELF_TOKENS = 4_194_304  # sampled at most; a longer training reads them again


@dataclass(frozen=True)
class UptrainResult:
    """The result of an uptraining. Losses are nats per token on the held-out text.

    Attributes:
        out: the folder that was written.
        recipe: the name of the recipe.
        before: loss of the folder that was trained.
        after: loss of the folder that was written.
        parent: loss of the teacher; None where there is none.
        tokens: that the whole model was trained on.
        seconds: of the training of the whole model.
        layers: for each layer, the errors of the layerwise stage.
        gap_closed: fraction of the loss gap to the parent that the training closed; negative: the loss rose. None
            where there is no parent, or no gap.
    """

    out: Path
    recipe: str
    before: float
    after: float
    parent: float | None
    tokens: int
    seconds: float
    layers: dict[int, dict[str, Any]]
    gap_closed: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self) | {"out": str(self.out)}


class Run:
    """One run, from opened folders to a published one.

    Args:
        recipe: what is trained, and how.
        name: of the recipe, for the record.
        folder: the folder that is trained.
        teacher: the parent; None: the one that the folder's record names, where it can be found.
        out: the folder to write.
        command: for the record.
        progress: gets the stages and figures of the first process.
        accept: names of checks whose failure is accepted and recorded.
        device: "cpu" or "cuda"; None: an accelerator if there is one.
        token: of the Hub, for the parent.

    Raises:
        HeadwiseError: the parts do not match, or memory is too small.
    """

    def __init__(
        self,
        recipe: UptrainRecipe,
        name: str,
        folder: ModelFolder,
        teacher: str | Path | None,
        out: Path,
        command: str,
        progress: Progress,
        accept: Collection[str] = (),
        device: str | None = None,
        token: str | None = None,
    ) -> None:
        self.recipe, self.name, self.folder, self.out = recipe, name, folder, out
        self.command, self.accept = command, accept
        self.processes = process_state(device)
        self.is_main_process, self.device = self.processes.is_main_process, self.processes.device
        self.progress = progress if self.is_main_process else SILENT
        self.record = read_record(folder.checkpoint.folder)
        parent = teacher if teacher is not None else recorded_source(self.record, folder.checkpoint.folder)
        self.teacher = (
            ModelFolder.of(open_checkpoint(parent, token=token, progress=progress)) if parent is not None else None
        )
        self.tokenizer = load_tokenizer(folder.checkpoint.folder, folder.checkpoint.source)
        check_compatible(recipe, folder, self.teacher, self.tokenizer, self.record)
        if recipe.train is not None:
            teacher_in_memory = self.teacher if recipe.needs_teacher_in_memory else None
            check_memory(folder, teacher_in_memory, recipe.train, recipe.data.length)
        check_reporters(recipe.train.report_to if recipe.train else [])
        self.training_dir = WorkFolder(out).folder / TRAINING
        self.before, self.parent = math.nan, None  # type: float, float | None
        self.heldout: Tensor | Pairs = torch.empty(0)
        self.marks = folder.pair_marks
        self.layers: dict[int, dict[str, Any]] = {}
        self.steps, self.seconds = 0, 0.0
        self.measured: dict[str, float] = {}  # seconds of a pass over the held-out text, by what is measured
        self.text: Mapping[str, Any] = {}

    def __call__(self, *, resume: bool, force: bool, max_shard_size: int | str) -> UptrainResult | None:
        """Train, and write the folder.

        Args:
            resume: continue an interrupted run.
            force: replace the folder, or begin again.
            max_shard_size: of the largest weight file.

        Returns:
            The result; None on all processes but the first.

        Raises:
            Diverged: the loss is NaN or diverges; checkpoints are kept.
            GateFailed: the model failed a check that is not accepted, before its training or after. Trained weights
                are kept.
            KeyboardInterrupt: a signal stopped the run; checkpoints are kept.
        """
        outputs = outcome.planned_outputs(self.folder.checkpoint)
        with ExitStack() as stack:
            writer = None
            if self.is_main_process:
                writer = Writer(
                    self.out,
                    outputs,
                    identity=self._identity(),
                    source=self.folder.checkpoint.path if self.folder.checkpoint.revision is None else None,
                    max_shard_size=max_shard_size,
                    resume=resume,
                    force=force,
                )
                stack.enter_context(writer)
                outcome.start_training_dir(writer, self.training_dir)
            self.processes.wait_for_everyone()
            try:
                return self._run(writer)
            except HeadwiseError as error:
                error.keeps_work |= self._has_trained()
                raise

    def _run(self, writer: Writer | None) -> UptrainResult | None:
        self._sample_text()
        self.progress.stage(f"reading {self.recipe.data.heldout}")
        self.heldout = self.heldout_blocks()
        self._measure_before(writer)
        student = Student.load(self.folder, self.teacher)
        if writer is not None and "checked" not in writer.notes:
            arguments = outcome.record_before(self.record, self.folder.checkpoint)["arguments"]
            outcome.check_export(student, self.training_dir / "untrained", arguments, self.accept, self.progress)
            writer.note("checked", True)
        self.processes.wait_for_everyone()
        if self.recipe.layerwise is not None:
            self._layer_by_layer(student, writer)
        student.select_parameters(self.recipe.train)
        state = self._train(student, writer) if self.recipe.train is not None else student.network.state_dict()
        return None if writer is None else self._publish(writer, student, state)

    def _has_trained(self) -> bool:
        """Return whether the work folder has trained weights."""
        return any(self.training_dir.glob("*.safetensors")) or any(self.training_dir.glob("checkpoint-*"))

    def heldout_blocks(self) -> Tensor | Pairs:
        """Return the text that measures progress, int64 (blocks, length) or pairs: as many as there are."""
        text = self.recipe.data
        if self.marks is not None:
            given = require_pairs(text.heldout, "heldout")[: text.heldout_blocks]
            return encode_pairs(given, self.tokenizer, self.marks, text.length)
        blocks = blocks_from(
            text.heldout,
            self.tokenizer,
            split="heldout",
            length=text.length,
            count=text.heldout_blocks,
            minimum=1,
            marked=True,
        )
        if text.heldout_blocks is not None and len(blocks) < text.heldout_blocks:
            self.progress.note(
                f"The held-out text fills {len(blocks)} blocks of {text.length} tokens, and the recipe's number is "
                f"{text.heldout_blocks}."
            )
        return blocks

    def training_blocks(self, tokens: int, seed: int) -> tuple[Any, Mapping[str, Any]]:
        """Return the text that is trained on: see `training_blocks` and `training_pairs` in `headwise.text`."""
        data = self.recipe.data
        if self.marks is not None:
            return training_pairs(data, self.tokenizer, self.marks, tokens // data.length, seed)
        if SELF not in data.text:
            return training_blocks(data, self.tokenizer, tokens, seed)
        sampled = str(self.training_dir / SELF_FILE)
        text = {sampled if source == SELF else source: times for source, times in data.text.items()}
        blocks, facts = training_blocks(replace(data, text=text), self.tokenizer, tokens, seed)
        return blocks, {SELF if source == sampled else source: fact for source, fact in facts.items()}

    def _sample_text(self) -> None:
        """Sample text from the parent, where the recipe trains on it; a resumed run has it in its folder."""
        path = self.training_dir / SELF_FILE
        if SELF in self.recipe.data.text and self.is_main_process and not path.exists():
            assert self.teacher is not None
            training, layerwise = self.recipe.train, self.recipe.layerwise
            budget = training.budget(outcome.pretraining_tokens(self.teacher, self.folder)) if training else 0
            tokens = min(SELF_TOKENS, max(budget, layerwise.tokens if layerwise else 0))
            seed, parent = self.recipe.seed, self.teacher.checkpoint
            write_samples(parent, path, tokens, seed=seed, device=self.device, progress=self.progress)
        self.processes.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        teacher = self.teacher.checkpoint.fingerprint() if self.teacher else None
        return {
            "source": self.folder.checkpoint.fingerprint(),
            "teacher": teacher,
            "recipe": asdict(self.recipe),
            "torch": torch.__version__,
        }

    def _measure_before(self, writer: Writer | None) -> None:
        """Measure the loss before training, and the parent's; a resumed run has them in its journal."""
        if writer is None:
            return
        if "nats" not in writer.notes:
            losses: list[float | None] = [self._nats(self.folder, "before training"), None]
            if self.teacher:
                losses[1] = self._nats(self.teacher, "of the parent")
            writer.note("nats", losses)
        self.before, self.parent = writer.notes["nats"]

    def _nats(self, folder: ModelFolder, which: str) -> float:
        """Return the nats per token of a folder's stock model on the held-out text, and keep the time of it."""
        self.progress.stage(f"loading {outcome.model_name(folder.checkpoint)}")
        network = folder.load(torch.float32 if self.device.type == "cpu" else torch.bfloat16, self.device)
        unit = "pairs" if isinstance(self.heldout, Pairs) else "blocks"
        self.progress.stage(f"measuring the loss {which}", len(self.heldout), unit)
        started = time.monotonic()
        nats = nats_per_token(network, self.heldout, progress=self.progress).nats
        self.measured[which] = time.monotonic() - started
        return nats

    def _forecast(self, training: Training, tokens: int) -> float | None:
        """Return the seconds of the training by the speed of the measurements; None in a run that resumes.

        A backward pass takes two forward passes, and checkpointing one more. The teacher runs forward beside it.
        """
        if "before training" not in self.measured:
            return None
        child, parent = self.measured["before training"], self.measured.get("of the parent", 0.0)
        passes = (4 if training.gradient_checkpointing else 3) * child
        passes += parent if self.recipe.needs_teacher_in_memory else 0.0
        text = len(self.heldout) * self.recipe.data.length
        measurements = 1 + tokens // training.batch_tokens // (training.evaluate_every or tokens)
        return float(passes * tokens / text / self.processes.num_processes + measurements * child)

    def _layer_by_layer(self, student: Student, writer: Writer | None) -> None:
        assert self.recipe.layerwise is not None and self.teacher is not None
        weights = self.training_dir / "layers.safetensors"
        if self.is_main_process and writer is not None and not weights.exists():
            tokens = self.recipe.layerwise.tokens
            num_blocks = tokens // self.recipe.data.length
            blocks, _ = self.training_blocks(tokens, self.recipe.seed + 1)
            if not isinstance(blocks, Tensor):
                blocks = torch.stack(list(islice(blocks, num_blocks)))
            blocks = tokens_of(blocks[: max(2, num_blocks)])
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
            save_tensors(student.network.state_dict(), student.attention_parameters(), weights)
        elif writer is not None:
            self.layers = {int(layer): report for layer, report in writer.notes["layers"].items()}
        self.processes.wait_for_everyone()
        load_tensors(student.network, weights)

    def _train(self, student: Student, writer: Writer | None) -> dict[str, Tensor]:
        """Train the whole model, and return its state dict; a resumed run takes up weights that are trained."""
        recipe, training = self.recipe, self.recipe.train
        assert training is not None
        weights = self.training_dir / WEIGHTS
        if weights.exists():
            if writer is not None:
                self.steps, self.seconds, self.text = (
                    writer.notes["trained"][k] for k in ("steps", "seconds", "text")
                )
            load_tensors(student.network, weights)
            return dict(student.network.state_dict())
        tokens = training.budget(outcome.pretraining_tokens(self.teacher, self.folder))
        self.progress.stage(f"reading {', '.join(recipe.data.text)}")
        # Whole steps of text and no more: the order of rows follows their number.
        whole_steps = math.ceil(tokens / training.batch_tokens) * training.batch_tokens
        if whole_steps != tokens:
            steps = whole_steps // training.batch_tokens
            self.progress.note(
                f"The budget of {tokens:,} tokens is rounded up to {steps:,} whole step{'s' * (steps != 1)} of "
                f"{training.batch_tokens:,}: {whole_steps:,} tokens."
            )
        blocks, self.text = self.training_blocks(whole_steps, training.seed)
        if isinstance(blocks, Tensor | Pairs):
            blocks = self._fill_a_step(blocks[: whole_steps // recipe.data.length], training.batch_tokens)
        collate: Any
        if self.marks is not None:
            collate = partial(collate_pairs, tokenizer=self.tokenizer, marks=self.marks)
        else:
            collate = packing.collator(student.base_model, recipe.data.separate_documents)
        teacher = None
        if recipe.loss.needs_teacher and recipe.teacher.topk is not None:
            assert self.teacher is not None
            if not isinstance(blocks, Tensor):
                raise SettingError(
                    "teacher.topk",
                    "`teacher.topk` needs text that is read at once, and this text is streamed.",
                    "Leave out teacher.topk, or give files.",
                )
            topk = min(recipe.teacher.topk, self.teacher.text.vocab_size)
            blocks = cache_teacher_topk(
                self.teacher,
                blocks,
                collate,
                topk=topk,
                temperature=recipe.loss.temperature,
                cache_dir=self.training_dir,
                progress=self.progress,
            )
            collate = collate_topk(collate)
        elif recipe.loss.needs_teacher:
            assert self.teacher is not None
            teacher = Teacher(self.teacher, self.device, training.compile)
        trained = {name: p.numel() for name, p in student.trained_parameters().items()}
        checkpoints = Checkpoints(
            self.training_dir,
            trained,
            num_kept=training.keep,
            export=lambda state, to: outcome.write_stock_model(student, state, to),
            nbytes=self.folder.checkpoint.nbytes,
        )
        if self.is_main_process:
            checkpoints.check_space()
        last = checkpoints.last
        if last is not None:
            checkpoints.load(student.network, last)
        scales = student.scales(self.teacher) if self.teacher else (1.0, 1.0)
        training = self._with_rate(training)
        trainer = make_trainer(
            student.network,
            blocks,
            self.heldout,
            training,
            Task(recipe.loss, teacher, scales, student.attention_paths),
            self.training_dir,
            self.progress,
            length=recipe.data.length,
            collate=collate,
            checkpoints=checkpoints,
            tokens=tokens,
            figures={
                "parent": self.parent,
                "before": self.before,
                "seconds": self._forecast(training, whole_steps),
            },
            device=self.device.type,
        )
        started = time.monotonic()
        resume(trainer, last)
        self.seconds, self.steps = time.monotonic() - started, trainer.state.global_step
        state = trainer.state_dict()
        if writer is not None:
            writer.note("trained", {"steps": self.steps, "seconds": self.seconds, "text": dict(self.text)})
            save_tensors(state, trained, weights)
        return state

    def _with_rate(self, training: Training) -> Training:
        """Return settings with a learning rate: a given one, with a warning if it is high, or the usual one."""
        size = self.folder.checkpoint.num_parameters
        usual, millions = training.usual_rate(size), f"{size / 1e6:,.0f} million parameters"
        if training.learning_rate is None:
            self.progress.note(f"Learning rate: {usual:.1e}, for {millions}.")
            return replace(training, learning_rate=usual)
        if training.learning_rate > HIGH_RATE * usual:
            self.progress.warn(
                f"The learning rate of {training.learning_rate:.1e} is high for {millions}, and can damage the "
                f"model: {usual:.1e} is usual (`train.learning_rate`)."
            )
        return training

    def _fill_a_step(self, blocks: Tensor | Pairs, batch_tokens: int) -> Tensor | Pairs:
        """Return the blocks, repeated where they are too few for one step of the optimizer."""
        rows = batch_tokens // self.recipe.data.length
        if len(blocks) >= rows:
            return blocks
        self.progress.note(
            f"The text fills {len(blocks)} {'blocks' if self.marks is None else 'pairs'} of "
            f"{self.recipe.data.length} tokens, and a step takes {rows}: "
            "each step reads them repeatedly."
        )
        return blocks[torch.arange(rows) % len(blocks)]

    def _publish(self, writer: Writer, student: Student, state: dict[str, Tensor]) -> UptrainResult:
        checkpoint = self.folder.checkpoint
        self.progress.stage("writing", total=checkpoint.nbytes, unit="bytes")
        student.release_memory()  # the check of the written folder needs it
        outcome.write_tensors(writer, student, state, self.progress)
        checkpoint.check_unchanged()
        after = math.nan

        def check(folder: Path) -> None:
            nonlocal after
            after = self._nats(ModelFolder.of(open_checkpoint(folder)), "after training")
            facts = self._facts(after)
            outcome.verify_and_write_metadata(writer, facts, self.record, checkpoint, self.accept, self.progress)

        if (curve := self.training_dir / "curve.csv").exists():
            title = f"Uptraining: {self.name}"
            if not draw_curve(curve, curve.with_suffix(".png"), parent=self.parent, title=title):
                self.progress.note("No curve is drawn: fewer than three losses were measured.")
        outcome.add_files(writer, checkpoint, self.training_dir)
        out = writer.publish(check)
        self.progress.finish()
        tokens = self.steps * self.recipe.train.batch_tokens if self.recipe.train else 0
        seconds = round(self.seconds, 1)
        closed = gap_closed(after, self.parent, self.before)
        return UptrainResult(out, self.name, self.before, after, self.parent, tokens, seconds, self.layers, closed)

    def _facts(self, after: float) -> dict[str, Any]:
        """Return what headwise.json and the model card hold of this run."""
        training, text = self.recipe.train, self.recipe.data
        return {
            "command": self.command,
            "recipe": self.name,
            "settings": public_data(json.loads(json.dumps(asdict(self.recipe)))),
            "teacher": outcome.model_name(self.teacher.checkpoint) if self.teacher else None,
            "text": public_data(self.text),
            "tokens": self.steps * training.batch_tokens if training else 0,
            "layerwise": {str(layer): report for layer, report in self.layers.items()},
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "hardware": outcome.hardware(),
            "versions": environment.versions(outcome.RECORDED_PACKAGES),
            "heldout": {"text": public_text(text.heldout), "tokens": num_predicted(self.heldout)},
            "nats": {"parent": self.parent, "before": self.before, "after": after},
            "gap_closed": gap_closed(after, self.parent, self.before),
        }
