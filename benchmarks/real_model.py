"""Convert a real model and measure the loss on three texts, target by target; one JSON line each.

    python benchmarks/real_model.py MODEL --text DIR --targets parent mla:128+64 gqa:1 --refit joint
    python benchmarks/real_model.py MODEL --text DIR --targets mla:128+64 --method transmla --refit off
    python benchmarks/real_model.py MODEL --text DIR --targets sample --sampled FILE     # beside the next one
    python benchmarks/real_model.py MODEL --text DIR --targets gqa:1 --sampled FILE      # waits for FILE

DIR holds wikitext2_raw_test.txt and tinystories_heldout.jsonl. Protocol: text without special tokens in blocks of
1,024; WikiText-2: the first half by characters, 96 blocks; stories: 32 blocks; code: the `email` package of this
Python's standard library, 32 blocks. Models run in float32 (TF32 on a GPU).

`--tasks DIR` adds lm-eval on the slices in DIR (hellaswag_1000.jsonl, piqa_500.jsonl, arc_easy_dev.jsonl,
lambada_1000.jsonl), no few-shot examples. `--out FILE` appends each row with the outcome of every question, so that
real_model_table.py can pair them. Conversions with one seed may share the text of the joint refit: `--sampled`.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality import target
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.refit import joint, joint_plan
from headwise.convert.settings import JOINT_REFITS
from headwise.io.reader import open_checkpoint
from headwise.measure.loss import nats_per_token
from headwise.progress import Progress
from headwise.text.sampled import sample_tokens
from headwise.train.student import load_for_sampling

LENGTH = 1024
METRICS = ("acc", "acc_norm")
MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ],
}
# File, the figure that is reported, and the task as lm-eval reads it.
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hellaswag": (
        "hellaswag_1000.jsonl",
        "acc_norm",
        MULTIPLE_CHOICE | {"doc_to_text": "{{query}}", "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}"},
    ),
    "piqa": (
        "piqa_500.jsonl",
        "acc_norm",
        MULTIPLE_CHOICE
        | {
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "{{[sol1, sol2]}}",
        },
    ),
    "arc_easy": (
        "arc_easy_dev.jsonl",
        "acc_norm",
        MULTIPLE_CHOICE
        | {
            "doc_to_text": "Question: {{question.stem}}\nAnswer:",
            "doc_to_target": "{{(question.choices | map(attribute='label') | list).index(answerKey)}}",
            "doc_to_choice": "{{question.choices | map(attribute='text') | list}}",
        },
    ),
    "lambada": (
        "lambada_1000.jsonl",
        "acc",
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1] | join(' ')}}",
            "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


class Shown(Progress):
    """Print the stages with their times."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Print a new stage."""
        print(f"{time.monotonic() - self.start:7.1f} s  {name}", flush=True)
        self.done, self.total, self.shown = 0, total, time.monotonic()

    def advance(self, amount: int = 1, **fields: object) -> None:
        """Print how much is done, every half minute."""
        self.done += amount
        if time.monotonic() - self.shown > 30:
            self.shown = time.monotonic()
            print(f"{self.shown - self.start:7.1f} s    {self.done:,} of {self.total or 0:,} {fields}", flush=True)


def blocks(tokenizer: Any, text: str, count: int) -> Tensor:
    """Return blocks of a text's tokens, (count, LENGTH) or fewer."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:count]


def texts(tokenizer: Any, folder: Path) -> dict[str, Tensor]:
    """Return the blocks of the three texts."""
    wiki = (folder / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    stories = (folder / "tinystories_heldout.jsonl").read_text(encoding="utf-8").splitlines()
    library = sorted(Path(sysconfig.get_paths()["stdlib"], "email").glob("*.py"))
    return {
        "wiki": blocks(tokenizer, wiki[: len(wiki) // 2], 96),
        "stories": blocks(tokenizer, " ".join(json.loads(line)["text"] for line in stories), 32),
        "code": blocks(tokenizer, "".join(path.read_text(errors="ignore") for path in library), 32),
    }


def measure(folder: str | Path, held: dict[str, Tensor], tasks: Path | None, device: str) -> dict[str, Any]:
    """Return nats per token on every text, and the outcome of every question ("1" where it is right)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    row: dict[str, Any] = {name: round(nats_per_token(model, tokens).nats, 4) for name, tokens in held.items()}
    return row | (outcomes(model, folder, tasks) if tasks else {})


def outcomes(model: Any, folder: str | Path, tasks: Path) -> dict[str, Any]:
    """Return the share of right answers for each task, and "right": a string of 0 and 1 for each task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as scratch:
        for name, (file, _, fields) in TASKS.items():
            data = {"data_files": {"test": str((tasks / file).resolve())}}
            config = {"task": f"slice_{name}", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
            Path(scratch, f"{name}.yaml").write_text(yaml.safe_dump(config | fields))
        result = simple_evaluate(
            HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=64),
            tasks=[f"slice_{name}" for name in TASKS],
            task_manager=TaskManager(include_path=scratch, include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = {name: sorted(result["samples"][f"slice_{name}"], key=lambda each: each["doc_id"]) for name in TASKS}
    right = {name: "".join(str(int(each[TASKS[name][1]])) for each in rows) for name, rows in samples.items()}
    return {name: round(100 * text.count("1") / len(text), 1) for name, text in right.items()} | {"right": right}


def sample(model: str, file: Path, seed: int, device: str, size: int | None, temperature: float) -> None:
    """Write the text of the joint refit; at temperature 1, as a conversion with this seed would sample it."""
    source = open_checkpoint(model)
    plan = joint_plan.scaled_plan(joint_plan.GPU_PLAN if device.startswith("cuda") else joint_plan.CPU_PLAN, size)
    tokens = sample_tokens(
        load_for_sampling(source, torch.device(device)),
        AutoTokenizer.from_pretrained(model),
        sequences=plan.num_sampled + plan.heldout,
        length=plan.sampled_length,
        seed=seed,
        temperature=temperature,
        progress=Shown(),
    )
    part = file.with_suffix(".part")
    save_file({"tokens": tokens.to(torch.int32)}, part)
    part.replace(file)


def share(file: Path) -> None:
    """Let the joint refit take its text from a file that another process writes."""

    def wait(*_: object, **__: object) -> Tensor:
        while not file.exists():
            time.sleep(1)
        return load_file(file)["tokens"].long()

    joint.sample_tokens = wait  # type: ignore[assignment]


def main() -> None:
    """Convert and measure every target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", required=True, metavar="parent|gqa:G|mla:RANK+ROPE")
    parser.add_argument("--method", default="optimal")
    parser.add_argument("--calibrate", default="sampled")
    parser.add_argument("--calibration-tokens", type=int, default=98_304)
    parser.add_argument("--refit", default="joint")
    parser.add_argument("--refit-tokens", type=int, help="distinct tokens of the joint refit's text")
    parser.add_argument("--refit-length", type=int, help="tokens in a sequence of the joint refit")
    parser.add_argument("--repeats", type=float, help="share of those sequences that repeat passages")
    parser.add_argument("--kl-steps", type=int, help="before --refit-tokens scales them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampled", type=Path, help="text of the joint refit, shared by processes")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the text that the target sample writes")
    parser.add_argument("--tasks", type=Path, help="folder of the lm-eval slices")
    parser.add_argument("--blocks", type=int, help="of each text, at most, evenly spread")
    parser.add_argument("--out", type=Path, help="file of rows to append to")
    parser.add_argument("--keep", type=Path, help="folder that keeps the converted models")
    parser.add_argument("--resume", action="store_true", help="continue the conversions that stopped in --keep")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    given = {"repeats": options.repeats, "kl_steps": options.kl_steps}
    joint_plan.GPU_PLAN, joint_plan.CPU_PLAN = (
        replace(plan, **{name: value for name, value in given.items() if value is not None})
        for plan in (joint_plan.GPU_PLAN, joint_plan.CPU_PLAN)
    )
    held = texts(AutoTokenizer.from_pretrained(options.model), options.text)
    if options.blocks:
        held = {name: rows[:: max(1, len(rows) // options.blocks)][: options.blocks] for name, rows in held.items()}
    for name in options.targets:
        row: dict[str, Any] = {
            "target": name,
            "method": options.method,
            "refit": options.refit,
            "refit_tokens": options.refit_tokens,
            "refit_length": None,
            "seed": options.seed,
        }
        if options.refit in JOINT_REFITS:
            row["refit_length"] = options.refit_length or joint_plan.GPU_PLAN.length
        if name == "sample":
            sample(
                options.model,
                options.sampled,
                options.seed,
                options.device,
                options.refit_tokens,
                options.temperature,
            )
            continue
        if options.sampled:
            share(options.sampled)
        if name == "parent":
            report({"target": name} | measure(options.model, held, options.tasks, options.device), options.out)
            continue
        with tempfile.TemporaryDirectory() as scratch:
            start = time.monotonic()
            done = convert_model(
                options.model,
                (options.keep or Path(scratch)) / name.replace(":", "-"),
                **target(name),
                method=options.method,
                calibrate=options.calibrate,
                calibration_tokens=options.calibration_tokens,
                refit=int(options.refit) if options.refit.isdecimal() else options.refit,
                refit_tokens=options.refit_tokens,
                refit_length=options.refit_length,
                seed=options.seed,
                device=options.device,
                progress=Shown(),
                resume=options.resume,
            )
            assert isinstance(done, ConvertResult) and done.verification is not None
            row |= {"seconds": round(time.monotonic() - start), "verified": done.verification.passed}
            row |= {"stages": done.refit, **measure(done.out, held, options.tasks, options.device)}
        report(row, options.out)


def report(row: dict[str, Any], out: Path | None) -> None:
    """Print a row, and append it to a file together with the outcome of every question."""
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print(json.dumps({name: value for name, value in row.items() if name != "right"}), flush=True)


if __name__ == "__main__":
    main()
