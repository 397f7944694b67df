"""Adam over one flat vector of parameters; the algorithms step with it.

Small networks spend more time in an optimiser's bookkeeping than in its arithmetic. Here the parameters are
views of one vector, so that a step is a handful of operations whatever the number of tensors, and its state
is two vectors and a count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)


class FlatAdam:
    """Adam (Kingma and Ba, 2015, algorithm 1, arXiv 1412.6980) with a bound on the gradient's norm.

    The parameters become views of `vector`; load new values into them in place.

    Args:
        parameters: float32, learned together.
        eps: added to the root of the second moment.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], eps: float) -> None:
        self.parameters = list(parameters)
        self.eps = eps
        self.steps = 0
        self.vector = _flatten([parameter.detach() for parameter in self.parameters])
        self.mean = torch.zeros_like(self.vector)
        self.square = torch.zeros_like(self.vector)
        self._lay_over()

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """One step against a gradient float32 [size]."""
        self.steps += 1
        first, second = BETAS
        self.mean.lerp_(gradient, 1.0 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        root = (self.square.sqrt() / math.sqrt(1.0 - second**self.steps)).add_(self.eps)
        self.vector.addcdiv_(self.mean, root, value=-learning_rate / (1.0 - first**self.steps))

    def state(self) -> dict[str, Tensor]:
        """A copy of the moments and the count; the parameters are the module's."""
        count = torch.tensor(self.steps, dtype=torch.int64)
        return {"mean": self.mean.clone(), "square": self.square.clone(), "steps": count}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to what `state` gave."""
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = int(state["steps"])

    def _lay_over(self) -> None:
        """Makes every parameter a view of its part of the vector."""
        start = 0
        for parameter in self.parameters:
            part = self.vector[start : start + parameter.numel()]
            parameter.data = part.view_as(parameter)
            start += parameter.numel()


def gradients_of(losses: Sequence[tuple[FlatAdam, Tensor]]) -> list[Tensor]:
    """The gradient of each scalar by the parameters beside it, float32 [size] each, in one backward pass.

    No loss may depend on another's parameters: it would be added to theirs.
    """
    parameters = [parameter for adam, _ in losses for parameter in adam.parameters]
    parts = torch.autograd.grad([loss for _, loss in losses], parameters)
    flat, start = [], 0
    for adam, _ in losses:
        flat.append(_flatten(parts[start : start + len(adam.parameters)]))
        start += len(adam.parameters)
    return flat


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.zeros(0)
