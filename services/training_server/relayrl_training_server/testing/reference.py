"""Slow, plain transcriptions that tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SlowAdam:
    """Adam, line by line as algorithm 1 of Kingma and Ba (2015), one tensor at a time.

    Args:
        groups: parameters with their learning rates.
        eps: ε.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], eps: float) -> None:
        self.entries = [(parameter, rate) for parameters, rate in groups for parameter in parameters]
        self.eps = eps
        self.t = 0
        self.m = [torch.zeros_like(parameter) for parameter, _ in self.entries]
        self.v = [torch.zeros_like(parameter) for parameter, _ in self.entries]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """θ ← θ − α m̂ / (√v̂ + ε)."""
        self.t += 1
        for i, ((parameter, rate), gradient) in enumerate(zip(self.entries, gradients, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * gradient
            self.v[i] = 0.999 * self.v[i] + 0.001 * gradient**2
            m_hat = self.m[i] / (1 - 0.9**self.t)
            v_hat = self.v[i] / (1 - 0.999**self.t)
            with torch.no_grad():
                parameter -= rate * m_hat / (v_hat.sqrt() + self.eps)
