"""Adam whose steps are relative to the size of each weight, so that one rate fits weights of any scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-30
# Numbers that are stepped together: bounds the memory of intermediate results.
AT_ONCE = 1 << 26


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
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for part in _parts(parameters):
                self._step_part(part, group)
        return loss

    def _step_part(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Step some parameters at once: one kernel for each operation on all of them."""
        first, second = group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        for state in states:
            state["step"] += 1
        steps = float(states[0]["step"])
        scales, means, squares = ([state[name] for state in states] for name in ("scale", "mean", "square"))
        gradients = [p.grad.to(p.dtype) for p in parameters if p.grad is not None]
        gradients = list(torch._foreach_mul(gradients, scales))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_div(squares, 1 - second**steps)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        torch._foreach_mul_(updates, scales)
        torch._foreach_add_(list[Tensor](parameters), updates, alpha=-group["lr"] / (1 - first**steps))


def _parts(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield runs of parameters of at most AT_ONCE numbers, or one parameter."""
    part: list[nn.Parameter] = []
    for parameter in parameters:
        if part and sum(each.numel() for each in part) + parameter.numel() > AT_ONCE:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part
