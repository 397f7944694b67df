"""Figures of a training as they build up: the rate of steps, the mean of the last returns.

`train.TrainingSession` feeds them from the acting thread and reads them from the one that shows them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

RETURNS_WINDOW = 100
RATE_SECONDS = 5.0


class RateMeter:
    """Steps per second over the last `window_seconds`, from (time, total) samples."""

    def __init__(self, window_seconds: float = RATE_SECONDS) -> None:
        self._window_seconds = window_seconds
        self._samples: deque[tuple[float, int]] = deque()

    def rate(self, now: float, total: int) -> float:
        """Adds a sample and returns the rate; 0 until there are two samples."""
        self._samples.append((now, total))
        while len(self._samples) > 2 and now - self._samples[0][0] > self._window_seconds:
            self._samples.popleft()
        first_at, first = self._samples[0]
        return (total - first) / (now - first_at) if now > first_at else 0.0


class ReturnsMeter:
    """Counts finished episodes and keeps the mean return of the last 100. Thread-safe."""

    def __init__(self, window: int = RETURNS_WINDOW) -> None:
        self._last: deque[float] = deque(maxlen=window)
        self._episodes = 0
        self._lock = threading.Lock()

    def add(self, returns: Iterable[float]) -> None:
        """Adds the returns of episodes that ended, oldest first."""
        with self._lock:
            for value in returns:
                self._last.append(value)
                self._episodes += 1

    @property
    def episodes(self) -> int:
        """Episodes that have ended."""
        return self._episodes

    @property
    def mean(self) -> float | None:
        """Mean return of the last episodes, None before the first."""
        with self._lock:
            return sum(self._last) / len(self._last) if self._last else None

    @property
    def is_full(self) -> bool:
        """Whether the window is full, so that the mean is of as many episodes as it says."""
        return len(self._last) == self._last.maxlen
