"""Evaluate MLA layers with their norms in float64, and compare a folder of a smaller cache with its parent."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.convert.verify.rounded import is_stored, rounds_weights
from headwise.convert.verify.whole_model import compare_logits
from headwise.io.reader import Checkpoint
from headwise.models import rope
from headwise.models.layout import from_planes, to_planes
from headwise.models.protocol import AttentionModel, LatentModel, latent_model
from headwise.models.stock import empty_model


class NormedAttention:
    """Evaluate the attention of single layers from the tensors of an MLA folder, its norms included, in float64.

    Args:
        checkpoint: the folder.
        model: its attention layers.
    """

    def __init__(self, checkpoint: Checkpoint, model: LatentModel) -> None:
        self._checkpoint, self._model = checkpoint, model
        stock = model.stock_config(checkpoint.config)
        self._frequencies, self._factor = rope.frequencies(
            stock.rope_parameters, stock.qk_rope_head_dim, stock.max_position_embeddings
        )
        network = empty_model(checkpoint.config, model.auto_class)
        self._scale = float(network.get_submodule(model.attention_path(0)).scaling)

    def __call__(self, layer: int, inputs: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Return the outputs of one layer, (sequences, tokens, D) float64.

        Args:
            layer: its index.
            inputs: (sequences, tokens, D) float64.
            tensors: of the layer's attention as the folder has them; None: they are read.
        """
        if tensors is None:
            tensors = self._model.tensors(self._checkpoint, layer, inputs.device)
        weights = self._model.read_normed(self._checkpoint.config, layer, tensors).to_device(inputs.device)
        x = inputs
        if weights.kv_down.shape[1] > x.shape[-1]:
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
        angles = positions[:, None] * self._frequencies.to(x)
        turned = torch.polar(torch.full_like(angles, self._factor), angles).T  # (planes, tokens)

        def rotate(vectors: Tensor) -> Tensor:  # (..., P, tokens)
            return from_planes(to_planes(vectors, vectors.shape[-2]) * turned)

        latent = (weights.normed(x @ weights.kv_down.T) * weights.norm).mT[:, None]  # (batch, 1, R, tokens)
        given = weights.query_inputs(x).mT[:, None]
        scores = (weights.q_nope @ given).mT @ (weights.k_up @ latent)
        scores = scores + rotate(weights.q_rope @ given).mT @ rotate(weights.k_rope @ x.mT)[:, None]
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        attention = (self._scale * scores).masked_fill(future, -torch.inf).softmax(-1)
        output = torch.einsum("bhtv,hdv->btd", attention @ (weights.v_up @ latent).mT, weights.o)
        bias = tensors.get(f"{self._model.attention_path(layer)}.o_proj.bias")
        return output if bias is None else output + bias.to(output)


def compare_reduced(
    checkpoint: Checkpoint, parent: Checkpoint, model: LatentModel, trained: bool
) -> tuple[bool, str]:
    """Compare what a reduction of the cache carries over with the parent's tensors.

    Args:
        checkpoint: the folder.
        parent: the model that it was converted from, of the same class.
        model: the folder's attention layers.
        trained: whether the folder was trained since.
    """
    before, after = model.layouts(parent.config), model.layouts(checkpoint.config)
    if len(before) != len(after):
        return False, f"the parent has {len(before)} layers, and the folder {len(after)}"
    if trained:
        return True, "the parent's shape and configuration; its weights were trained since"
    own = {name for layer in range(len(after)) for name in model.tensor_names(checkpoint.config, layer)}
    first = {name for name in own if ".q_a_" in name}
    for name in (parent.tensors.keys() | checkpoint.tensors.keys()) - (own - first):
        if name not in checkpoint.tensors or name not in parent.tensors:
            return False, f"{name} is in one of the two models only"
        if not is_stored(checkpoint, name, parent.read(name).to(checkpoint.tensors[name].dtype)):
            return False, f"{name} is not the parent's"
    return True, "outside attention, and in the first factor of the queries, every tensor is the parent's"


def compare_expanded(
    checkpoint: Checkpoint,
    parent: Checkpoint,
    model: AttentionModel,
    trained: bool,
    device: torch.device | str = "cpu",
) -> tuple[bool, str]:
    """Compare heads that were made from MLA with their parent: its tensors outside attention, and its logits.

    Args:
        checkpoint: the folder.
        parent: the model with MLA that it was converted from.
        model: the folder's attention layers.
        trained: whether the folder was trained since.
        device: where the models run.
    """
    before = latent_model(parent.config)
    if len(model.layouts(checkpoint.config)) != len(before.layouts(parent.config)):
        return False, "the parent and the folder differ in their number of layers"
    if trained:
        return True, "the parent's shape and configuration; its weights were trained since"
    for name in checkpoint.tensors:
        if f".{model.attention}." in name:
            continue
        if name not in parent.tensors or not is_stored(
            checkpoint, name, parent.read(name).to(checkpoint.tensors[name].dtype)
        ):
            return False, f"{name} is not the parent's"
    if rounds_weights(checkpoint):
        return True, "outside attention, every tensor is the parent's, some rounded to FP8"
    agree, logits = compare_logits(checkpoint, parent, model, before, recomputed=True, device=device)
    return agree, f"exact: outside attention, every tensor is the parent's{logits}"
