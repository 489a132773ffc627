"""Adam whose steps are relative to the size of each weight, so that one rate fits weights of any scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-30


def step_scale(weight: Tensor) -> Tensor:
    """Return the scale of each weight's steps: its row's root mean square times its column's, over the matrix's.

    Rows and columns of one matrix may belong to different things: a latent and a rotary key, keys and values, heads
    of high and of low norm. Steps relative to the whole matrix are too large for the small ones: they made an MLA
    layer worse.

    Args:
        weight: a matrix, or a vector, whose scale is one number.
    """
    energy = weight.square()
    if weight.ndim < 2:
        return energy.mean().sqrt()
    return (energy.mean(1, keepdim=True) * energy.mean(0, keepdim=True) / energy.mean().clamp_min(TINY)).sqrt()


class RelativeAdam(torch.optim.Optimizer):
    """Adam on weights divided by their `step_scale`, which is taken when the optimizer is made.

    Args:
        parameters: what is trained.
        lr: learning rate, relative to the size of each weight.
        betas: decay rates of the averages.
        eps: added to the root of the second average.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-12,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})
        for parameter in self._parameters():
            self.state[parameter] = {
                "step": torch.tensor(0.0),
                "scale": step_scale(parameter.detach()).clamp_min(TINY),
                "mean": torch.zeros_like(parameter),
                "square": torch.zeros_like(parameter),
            }

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: computes the loss again; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                steps = float(state["step"])
                gradient = parameter.grad.float() * state["scale"]
                state["mean"].lerp_(gradient, 1 - first)
                state["square"].lerp_(gradient.square(), 1 - second)
                mean = state["mean"] / (1 - first**steps)
                root = (state["square"] / (1 - second**steps)).sqrt_().add_(group["eps"])
                parameter.sub_((mean / root).mul_(state["scale"]).mul_(group["lr"]))
        return loss
