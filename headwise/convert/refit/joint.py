"""Recover all converted layers of a written folder together, before it is verified (mathematics, section 7b).

The closed forms are on disk already. Text is sampled from the parent, the attention is trained by
`headwise.train.recovery`, and the trained tensors replace the written ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.corpus import NUM_HELDBACK, SAMPLED, keep_corpus
from headwise.convert.refit.joint_plan import training_processes
from headwise.convert.spread import DevicePool
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.io.tokenizer import load_tokenizer
from headwise.io.workdir import write_file_atomically
from headwise.io.writer import Writer
from headwise.progress import Progress
from headwise.text.repeats import join_rows, repeat_passages
from headwise.text.sampled import sample_tokens
from headwise.train.launch import free_port, joined
from headwise.train.recovery import JointPlan, StageReport, as_records, recover_jointly
from headwise.train.student import ModelFolder, Student, load_for_sampling

# Files in the work folder of what took time: a run that was interrupted goes on from them.
TEXT, STAGES, TRAINED = "sampled.safetensors", "joint", "trained.safetensors"
NOTE = "joint refit"


@dataclass(frozen=True)
class JointTraining:
    """The training of a joint refit, which several processes do together.

    Attributes:
        folder: the complete, unpublished output.
        parent: the model that it was converted from.
        names: the tensors that the conversion computed; no others are written.
        plan: tokens and steps.
        work: the folder of the text, the stages and the result.
        seed: of the order of the text.
        count: of the processes.
        port: on which the first of them listens.
    """

    folder: Path
    parent: Checkpoint
    names: frozenset[str]
    plan: JointPlan
    work: Path
    seed: int
    count: int
    port: int

    def results(
        self, items: Iterable[int], device: torch.device, progress: Progress
    ) -> Iterator[list[StageReport]]:
        """Train, and write the trained tensors; yield the reports of the stages in the first process.

        Args:
            items: the place of this process.
            device: of this process.
            progress: receives the stages.
        """
        plan, parent = self.plan, ModelFolder.of(self.parent)
        blocks = load_file(self.work / TEXT)["tokens"].long()
        rows = repeat_passages(join_rows(blocks[plan.heldout :], plan.length), plan.repeats, self.seed)
        for place in items:
            with joined(place, self.count, device, self.port):
                student = Student.load(ModelFolder.of(open_checkpoint(self.folder)), parent)
                reports = recover_jointly(
                    student,
                    parent,
                    rows,
                    blocks[: plan.heldout],
                    plan,
                    self.work / STAGES,
                    seed=self.seed,
                    device=device,
                    progress=progress,
                )
            if place == 0:
                state = {name: tensor.detach().to("cpu") for name, tensor in student.network.state_dict().items()}
                trained = {name: tensor for name, tensor in student.export(state) if name in self.names}
                write_file_atomically(self.work / TRAINED, partial(save_file, trained))
                yield reports


def refit_jointly(
    writer: Writer,
    parent: Checkpoint,
    names: Collection[str],
    plan: JointPlan,
    *,
    seed: int,
    devices: Sequence[torch.device],
    pool: DevicePool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train the converted attention of a complete, unpublished folder, and write it again.

    Args:
        writer: of the folder.
        parent: the model that it was converted from.
        names: the tensors that the conversion computed; no others are written again.
        plan: tokens and steps.
        seed: of the sampled text and its order.
        devices: where the models are trained; text is sampled on the first.
        pool: the processes of the devices.
        progress: receives the stages.

    Returns:
        A report for each stage, as headwise.json holds it.
    """
    work = writer.work.folder
    if NOTE not in writer.notes:
        if "joint stages" not in writer.notes:
            shutil.rmtree(work / STAGES, ignore_errors=True)  # of an earlier run
            writer.note("joint stages", True)
        _sampled_blocks(writer, parent, plan, seed, devices[0], progress)
        count = training_processes(plan, devices)
        training = JointTraining(writer.folder, parent, frozenset(names), plan, work, seed, count, free_port())
        (reports,) = (
            pool.begin(training, range(count), progress, processes=count, together=True)
            if count > 1
            else training.results([0], devices[0], progress)
        )
        writer.note(NOTE, as_records(reports))
    tensors: dict[str, Tensor] = load_file(work / TRAINED)
    for name, tensor in tensors.items():
        writer.rewrite(name, tensor)
    result: list[dict[str, Any]] = writer.notes[NOTE]
    return result


def share_text(
    writer: Writer,
    parent: Checkpoint,
    plan: JointPlan,
    calibration: CalibrationPlan,
    cache: Path,
    device: torch.device,
    progress: Progress,
) -> None:
    """Sample the text of the joint refit before the calibration, which reads a part of it.

    Sampling takes as many steps for few sequences as for many, so one text for both saves minutes.

    Args:
        writer: of the output folder.
        parent: the model that is converted.
        plan: tokens and steps of the refit.
        calibration: what is measured; text other than "sampled", or of another length, is not shared.
        cache: folder that keeps the calibration text.
        device: where text is sampled.
        progress: receives the stage.
    """
    if calibration.text != SAMPLED or calibration.length != plan.sampled_length:
        return
    blocks = _sampled_blocks(writer, parent, plan, calibration.seed, device, progress)
    heldout, rest = blocks[: plan.heldout], blocks[plan.heldout :]
    if len(rest) >= calibration.sequences:
        keep_corpus(cache, calibration, torch.cat([rest[: calibration.sequences], heldout[:NUM_HELDBACK]]))


def _sampled_blocks(
    writer: Writer, parent: Checkpoint, plan: JointPlan, seed: int, device: torch.device, progress: Progress
) -> Tensor:
    path = writer.work.folder / TEXT
    if path.exists() and "joint text" in writer.notes:
        return load_file(path)["tokens"].long()
    blocks = sample_tokens(
        load_for_sampling(parent, device),
        load_tokenizer(parent.folder, parent.source),
        sequences=plan.num_sampled + plan.heldout,
        length=plan.sampled_length,
        seed=seed,
        progress=progress,
    )
    write_file_atomically(path, lambda to: save_file({"tokens": blocks.to(torch.int32)}, to))
    writer.note("joint text", True)
    return blocks
