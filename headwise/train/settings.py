"""Everything that a user decides about a training run: defaults, legal values and contradictions, once.

Each class is one part of a recipe, and checks itself when it is made. Rules between the parts are in
`headwise.recipes.settings`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headwise import fields
from headwise.errors import SettingError
from headwise.fields import check_fields

# How `headwise uptrain --launch` starts processes: the configurations of accelerate in recipes/accelerate.
LAUNCH_KINDS = ("single", "ddp", "fsdp2")
# The peak learning rate by the number of parameters: the best one of the embedded model
# (docs/results/uptraining.md), falling to 2e-5 at 7 billion, as is usual there. LoRA takes ten times the rate of a
# full training (Schulman et al., "LoRA Without Regret", 2025).
SMALL_RATE, SMALL_MODEL, RATE_FALL, LORA_RATE = 4e-4, 5_000_000, 0.41, 10


@dataclass(frozen=True)
class Loss:
    """The training loss: a sum of terms with these weights. All but cross-entropy need a teacher.

    Raises:
        SettingError: a weight is negative, or no term has one.
    """

    kl: float = fields.positive(
        "Forward KL (teacher || student), over the vocabulary or over the teacher's top-k tokens.",
        default=0.0,
        zero=True,
    )
    reverse_kl: float = fields.positive("KL (student || teacher).", default=0.0, zero=True)
    jsd: float = fields.positive("Jensen-Shannon divergence.", default=0.0, zero=True)
    hidden_states: float = fields.positive(
        "Relative squared error of the residual stream, a mean over all layers.", default=0.0, zero=True
    )
    attention_outputs: float = fields.positive(
        "Relative squared error of the attention outputs, a mean over all layers.", default=0.0, zero=True
    )
    cross_entropy: float = fields.positive("Next-token cross-entropy on the text.", default=0.0, zero=True)
    temperature: float = fields.positive(
        "Temperature of both distributions in the divergences, which are multiplied by its square.", default=1.0
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not any(self.weights.values()):
            raise SettingError("kl", f"The loss has no term: give {' or '.join(self.weights)} a weight.")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term by its name."""
        return {name: value for name, value in asdict(self).items() if name != "temperature"}

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with a teacher."""
        return any(weight for name, weight in self.weights.items() if name != "cross_entropy")

    @property
    def needs_activations(self) -> bool:
        """Whether a term compares activations inside the models."""
        return bool(self.hidden_states or self.attention_outputs)


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher takes part.

    Raises:
        SettingError: `topk` is not a whole number of at least 1.
    """

    topk: int | None = fields.number(
        "Null: the teacher runs beside the student. A number: its most likely tokens at every position are written "
        "to disk before the student is loaded, for a teacher that does not fit beside it."
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (peft) on the attention projections, merged into the weights at the end.

    Raises:
        SettingError: a value is not legal.
    """

    rank: int = fields.number("Rank of the adapters.", default=32)
    alpha: int = fields.number("Scale of the adapters; the weights change by alpha / rank B A.", default=64)
    dropout: float = fields.fraction("Dropout in front of the adapters.", default=0.0, zero=True)

    def __post_init__(self) -> None:
        check_fields(self)


def _check_betas(value: Any) -> tuple[float, float]:
    first, second = (float(beta) for beta in value)
    if isinstance(value, str) or not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError
    return first, second


def _check_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) and name for name in value):
        raise ValueError
    return tuple(value)


@dataclass(frozen=True)
class Training:
    """One run of AdamW. Budgets are tokens, not steps: `tokens`, or else a `fraction` of `pretraining_tokens`.

    Raises:
        SettingError: a value is not legal, the budget is missing, or two values contradict each other.
    """

    tokens: int | None = fields.number("Tokens to train on.")
    fraction: float | None = fields.fraction("Budget as a fraction of the pretraining, 0.05 or 5%.")
    pretraining_tokens: int | None = fields.number(
        "Tokens that the model was pretrained on (null: as the training.json of the parent's folder gives it)."
    )
    parameters: str = fields.choice("Which parameters are trained.", ("all", "attention"), default="all")
    lora: Lora | None = None
    gradient_checkpointing: bool = fields.flag("Recompute activations in the backward pass to save memory.")
    seconds: float | None = fields.positive(
        "Seconds that the run may take: the number of tokens is lowered early in the run so that it fits."
    )
    batch_tokens: int = fields.number("Tokens in one optimizer step, all processes together.", default=131072)
    micro_batch_tokens: int | None = fields.number(
        "Tokens in one forward pass of one process (null: its whole part of the batch)."
    )
    learning_rate: float | None = fields.positive(
        "Peak learning rate (null: by the number of parameters, from 4e-4 at 5 million to 2e-5 at 7 billion)."
    )
    schedule: str = fields.choice(
        "cosine: warm up, then a half cosine. wsd: warm up, stay, then linear over the last fifth.",
        ("cosine", "wsd"),
        default="cosine",
    )
    warmup: float = fields.fraction("Fraction of the run with a rising learning rate.", default=0.02, zero=True)
    final_learning_rate: float = fields.fraction(
        "Learning rate at the end, as a fraction of the peak.", default=0.0, zero=True
    )
    weight_decay: float = fields.positive("Weight decay of AdamW.", default=0.1, zero=True)
    betas: Sequence[float] = fields.other(
        "Decay rates of AdamW's averages.",
        default=(0.9, 0.95),
        check=_check_betas,
        wanted="a list of two numbers from 0 to below 1",
        metavar="NUMBERS",
        parse=lambda word: word.split(","),
    )
    max_grad_norm: float = fields.positive("Largest norm of the gradient; 0: no limit.", default=1.0, zero=True)
    precision: str = fields.choice(
        "bf16: master weights in float32, matrix products in bfloat16.", ("bf16", "float32"), default="bf16"
    )
    compile: bool = fields.flag("Compile the models and the loss with torch.compile.")
    log_every: int = fields.number("Steps between two reports.", default=20)
    evaluate_every: int | None = fields.number(
        "Steps between two measurements on the held-out text (null: only before and after)."
    )
    save_every: int | None = fields.number(
        "Steps between two checkpoints (null: ten in a long run; 0: only when the run is stopped).", minimum=0
    )
    keep: int = fields.number("Checkpoints kept.", default=2)
    report_to: Sequence[str] = fields.other(
        "tensorboard, wandb: integrations that transformers' Trainer knows and that are installed.",
        default=(),
        check=_check_names,
        wanted="a list of names",
        metavar="NAMES",
        parse=lambda word: word.split(","),
    )
    seed: int = fields.number("Seed of everything random.", minimum=0, default=0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokens is None and self.fraction is None:
            raise SettingError("tokens", "`tokens` is missing (or `fraction`).")
        if self.lora is not None and not isinstance(self.lora, Lora):
            raise SettingError("lora", f"`lora` is {self.lora!r}, which is not a mapping.")
        if self.lora is not None and self.parameters == "all":
            raise SettingError(
                "lora", "`lora` puts adapters on attention alone, and `parameters` is all: make it attention."
            )

    def usual_rate(self, num_parameters: int) -> float:
        """Return the usual peak learning rate for a model of this size.

        Args:
            num_parameters: of the whole model.
        """
        fall = float((SMALL_MODEL / max(num_parameters, SMALL_MODEL)) ** RATE_FALL)
        return SMALL_RATE * fall * (LORA_RATE if self.lora else 1)

    def budget(self, pretraining_tokens: int | None = None) -> int:
        """Return the tokens of the run.

        Args:
            pretraining_tokens: the size of the pretraining, where the settings do not have it.

        Raises:
            SettingError: `fraction` is set but the number of pretraining tokens is unknown.
        """
        if self.tokens is not None:
            return self.tokens
        known = self.pretraining_tokens or pretraining_tokens
        if known is None:
            raise SettingError(
                "pretraining_tokens",
                f"`train.fraction` is {self.fraction}, but the number of pretraining tokens is unknown.",
                "Give `train.pretraining_tokens`, such as 15T, or a budget in tokens.",
            )
        return math.ceil((self.fraction or 0) * known)
