"""What training takes in memory, per process, from the shapes in two configs: before anything is loaded.

The numbers kept for the backward pass were counted on the stock classes: what autograd saves of a layer, in bytes
per token, for many widths. Mixed precision keeps the residual stream and the norms in float32, and what enters a
matrix product in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headwise.errors import HeadwiseError
from headwise.format import size

# A process that has imported torch, with its kernels loaded on the device.
RESTING_BYTES = 1 << 30
# Of the allocator: what it holds and cannot use.
FRAGMENTATION = 0.03


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory follows from.

    Attributes:
        parameters: all of them, tied ones once. embedding: of these, what is looked up and never multiplied.
        intermediate: numbers of a token in the MLP, in all its experts together.
        queries, outputs: numbers of all heads' queries and outputs in one token. Keys and values count as many:
            they are expanded to every head wherever documents are kept apart by a mask.
        latent: numbers of an MLA layer's latent, else 0.
    """

    parameters: int
    embedding: int
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate: int
    queries: int
    outputs: int
    latent: int = 0

    @classmethod
    def of(cls, text: Any, parameters: int) -> Shape:
        """From a stock text config and the number of parameters in the files."""
        width, heads = text.hidden_size, text.num_attention_heads
        tied = getattr(text, "tie_word_embeddings", False)
        dense = getattr(text, "first_k_dense_replace", 0) >= text.num_hidden_layers
        experts = None if dense else getattr(text, "num_experts_per_tok", None)
        narrow = getattr(text, "moe_intermediate_size", None)
        intermediate = getattr(text, "intermediate_size", None) or 4 * width
        if experts and narrow:
            intermediate = max(intermediate, experts * narrow)
        elif experts:
            intermediate *= experts
        latent = getattr(text, "kv_lora_rank", None) or 0
        if latent:
            queries = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim)
            outputs = heads * text.v_head_dim
        else:
            head = getattr(text, "head_dim", None) or width // heads
            queries = outputs = heads * head
        return cls(
            parameters=parameters,
            embedding=0 if tied else text.vocab_size * width,
            hidden_size=width,
            num_hidden_layers=text.num_hidden_layers,
            vocab_size=text.vocab_size,
            intermediate=intermediate,
            queries=queries,
            outputs=outputs,
            latent=latent,
        )

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        ends = self.vocab_size * self.hidden_size + self.embedding
        return (self.parameters - ends) // self.num_hidden_layers

    def kept(self, half: int) -> int:
        """Bytes that a layer keeps for a token's backward pass; `half` is 2 under bfloat16, else 4."""
        stream = (26 if half == 2 else 24) * self.hidden_size
        attention = 2 * (self.queries + self.outputs)
        if self.latent:  # heads are split, rotated, expanded and joined again
            attention += 3 * (self.queries + self.latent) // 2 + self.outputs
        return stream + half * (4 * self.intermediate + attention)


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int
    rest: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def forecast(
    student: Shape,
    *,
    trained: int,
    tokens: int,
    teacher: Shape | None = None,
    half: bool = True,
    checkpointing: bool = False,
    sharded: int = 1,
    replicas: int = 1,
    piece: int = 1 << 25,
) -> Forecast:
    """The peak of one process.

    Args:
        trained: parameters that get gradients.
        tokens: what goes through the model at once.
        teacher: the model beside it, if there is one.
        half: bfloat16 products and teacher (float32 otherwise, as on a CPU).
        checkpointing: of activations, layer by layer.
        sharded: processes over which FSDP2 spreads everything that lasts.
        replicas: processes that hold whole copies (DDP, which gathers gradients in buckets as large as they are).
        piece: numbers of logits that the loss brings to float32 at once.
    """
    wide = 2 if half else 4
    whole_layers = 2 * 4 * student.layer if sharded > 1 else 0  # one in use, one under way
    ends = 4 * (student.vocab_size * student.hidden_size + student.embedding) if sharded > 1 else 0
    # Products are of bfloat16 copies of the weights; kept for the backward pass unless they are made again.
    copied = (student.layer if checkpointing else student.layer * student.num_hidden_layers) + (
        student.vocab_size * student.hidden_size
    )
    copies = 2 * copied if half else 0
    kept = student.kept(wide) * tokens
    if checkpointing:
        saved = student.num_hidden_layers * 4 * student.hidden_size * tokens
        activations = saved + int(1.5 * kept)
    else:
        activations = student.num_hidden_layers * kept + kept // 2
    numbers = tokens * student.vocab_size
    # The student's, their gradient, the teacher's; then a piece of them in float32 with what its loss makes.
    logits = (3 if teacher else 2) * wide * numbers + 4 * 10 * min(piece, numbers)
    lasting = 0 if teacher is None else wide * teacher.parameters // sharded
    if teacher is not None and sharded > 1:
        lasting += 2 * wide * teacher.layer + wide * teacher.vocab_size * teacher.hidden_size
    parts = {
        "parameters": 4 * student.parameters // sharded + whole_layers + ends,
        "gradients": 4 * trained // sharded * (2 if replicas > 1 else 1) + (whole_layers + ends) // 2,
        "optimizer": 8 * trained // sharded,
        "teacher": lasting,
        "activations": activations + copies,
        "logits": logits,
    }
    return Forecast(**parts, rest=RESTING_BYTES + int(FRAGMENTATION * sum(parts.values())))


def refuse_unless_it_fits(found: Forecast, free: int, where: str, leaner: Mapping[str, Forecast]) -> None:
    """Refuse what the memory will not hold.

    Args:
        free: bytes that are left.
        where: on what.
        leaner: what to add to the command, and the forecast with it.

    Raises:
        HeadwiseError: naming both numbers, and the first of `leaner` that fits.
    """
    if found.total <= free:
        return
    parts = sorted(asdict(found).items(), key=lambda part: -part[1])[:3]
    most = ", ".join(f"{name} {size(number)}" for name, number in parts)
    fits = next(((words, other) for words, other in leaner.items() if other.total <= free), None)
    raise HeadwiseError(
        f"Training needs about {size(found.total)} of memory ({most}), and {where} has {size(free)} free.",
        f"With {fits[0]} it needs {size(fits[1].total)}."
        if fits
        else "Train on more GPUs with --launch fsdp2, or only a part: --set train.parameters=attention.",
    )
