"""Running statistics of observations and returns (contracts H5); an algorithm absorbs each batch once.

Everything is accumulated in float64. Statistics are frozen while an update runs and absorb its batch after
the last epoch, so that the policy that learned and the policy that acts saw the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import SpecMismatch

_EPSILON = 1e-8


@dataclass(slots=True)
class RunningStatistics:
    """Mean and variance of every element of one leaf, over all rows absorbed so far.

    Chan, Golub and LeVeque, 1979: batches are merged by their counts, means and sums of squared deviations.
    """

    shape: tuple[int, ...]
    count: int = 0
    mean: NDArray[np.float64] = field(init=False)
    squares: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.mean = np.zeros(self.shape, dtype=np.float64)
        self.squares = np.zeros(self.shape, dtype=np.float64)

    def absorb(self, rows: NDArray[np.generic]) -> None:
        """Adds rows [N, *shape]. Rows that are not finite are left out, so that they do not spread.

        Raises:
            SpecMismatch: the rows have another shape.
        """
        if rows.shape[1:] != self.shape:
            raise SpecMismatch(f"statistics: expected rows of {self.shape}, got {rows.shape[1:]}")
        values = np.asarray(rows, dtype=np.float64)
        values = values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]
        if not len(values):
            return
        mean = values.mean(axis=0)
        squares = np.square(values - mean).sum(axis=0)
        total = self.count + len(values)
        shift = mean - self.mean
        self.squares += squares + np.square(shift) * (self.count * len(values) / total)
        self.mean += shift * (len(values) / total)
        self.count = total

    @property
    def variance(self) -> NDArray[np.float64]:
        """The population variance, float64 [*shape]; 1 before the first row."""
        return np.asarray(self.squares / self.count if self.count else np.ones(self.shape), dtype=np.float64)

    @property
    def inv_std(self) -> NDArray[np.float32]:
        """1 / sqrt(variance + 1e-8), float32 [*shape]; 1 before the first row."""
        if not self.count:
            return np.ones(self.shape, dtype=np.float32)
        return np.asarray(1.0 / np.sqrt(self.variance + _EPSILON), dtype=np.float32)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Arrays that `restore` takes, for a checkpoint."""
        count = np.array(self.count, dtype=np.int64)
        return {"count": count, "mean": self.mean.copy(), "squares": self.squares.copy()}

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Goes back to what `state` gave, to the bit.

        Raises:
            SpecMismatch: it is the state of a leaf of another shape.
        """
        if state["mean"].shape != self.shape:
            raise SpecMismatch(
                f"statistics: a checkpoint of {state['mean'].shape}, this run has {self.shape}"
            )
        self.count = int(np.asarray(state["count"]).item())
        self.mean = np.asarray(state["mean"], dtype=np.float64).copy()
        self.squares = np.asarray(state["squares"], dtype=np.float64).copy()


def forward_returns(
    rewards: NDArray[np.floating], mask: NDArray[np.bool_], gamma: float
) -> NDArray[np.float64]:
    """R_t = γ R_{t−1} + r_t from each chain's start: what VecNormalize takes the deviation of.

    Args:
        rewards: floats [T, B].
        mask: bool [T, B], True where there is a step.
        gamma: the discount a step.

    Returns:
        float64 [number of steps], chain by chain.
    """
    running = np.zeros(rewards.shape[1], dtype=np.float64)
    sums = np.zeros(rewards.shape, dtype=np.float64)
    for t in range(rewards.shape[0]):
        running = gamma * running + np.where(mask[t], rewards[t], 0.0)
        sums[t] = running
    steps: NDArray[np.float64] = sums.T[mask.T]
    return steps
