"""The noise that samples actions, drawn by the client from a counter-based generator (contracts F2, H2).

Philox4x32-10: key = (low 32 bits of the run's seed, client_index), counter = (actor_index, episode_index,
step, block). One block is four 32-bit words; blocks run over all noise leaves in order and every leaf starts
on a fresh block. A word x becomes u = (x + 0.5) / 2**32 in float64, and u becomes

- gumbel: -log(-log u)
- logistic: log u - log1p(-u)
- normal: Box-Muller on the pairs (u0, u1) of a block: sqrt(-2 log u0) * (cos 2πu1, sin 2πu1)

rounded to float32. The value of a step depends on nothing but its counters, never on what was drawn before;
`NoiseSource` therefore draws several steps ahead in one vector call. B = rows (actors) of a call.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.policy.manifest import NoiseKind, NoiseLeaf

Noise = dict[str, NDArray[np.float32]]
_Words = NDArray[np.uint64]

_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)
_MULTIPLIERS = np.array((0xD2511F53, 0xCD9E8D57), np.uint64)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
_WORDS_PER_BLOCK = 4

_AHEAD_STEPS = 256
_AHEAD_STEPS_AT_FIRST = 64  # of an episode, which may be short
_AHEAD_ROWS = 1 << 14  # drawn in one call, actors times steps: what a cache holds
_AHEAD_WORDS_PER_ACTOR = 1024
_CACHE_WORDS = 1 << 22
_REFILL_TOGETHER_ROWS = 16


def philox4x32(counter: Sequence[_Words], key: tuple[int, int]) -> list[_Words]:
    """Four words for each counter.

    Args:
        counter: four uint64 arrays of equal shape with values below 2**32.
        key: two integers below 2**32.

    Returns:
        Four uint64 arrays of that shape with values below 2**32.
    """
    even, odd = np.stack((counter[0], counter[2])), np.stack((counter[1], counter[3]))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product = (even * _MULTIPLIERS.reshape(2, *[1] * (even.ndim - 1)))[::-1]
        keys = np.array((k0, k1), np.uint64).reshape(2, *[1] * (even.ndim - 1))
        even, odd = (product >> _SHIFT_32) ^ odd ^ keys, product & _LOW_32
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return [even[0], odd[0], even[1], odd[1]]


def _shape_noise(kind: NoiseKind, words: NDArray[np.uint64], width: int) -> NDArray[np.float64]:
    """Words [N, at least width rounded up to pairs] as noise [N, width]."""
    if kind == "normal":
        uniform = _uniform(words[:, : width + width % 2])
        radius = np.sqrt(-2.0 * np.log(uniform[:, 0::2]))
        angle = 2.0 * np.pi * uniform[:, 1::2]
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
        return pairs.reshape(len(words), -1)[:, :width]
    uniform = _uniform(words[:, :width])
    if kind == "gumbel":
        noise: NDArray[np.float64] = -np.log(-np.log(uniform))
        return noise
    return np.asarray(np.log(uniform) - np.log1p(-uniform))


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words as numbers in the open unit interval."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def _blocks(width: int) -> int:
    return -(-width // _WORDS_PER_BLOCK)


def draw_directly(
    leaves: Sequence[NoiseLeaf],
    key: tuple[int, int],
    actor_index: NDArray[np.int64],
    episode_index: NDArray[np.int64],
    step: NDArray[np.int64],
) -> Noise:
    """Noise of N counters, without drawing ahead: what `NoiseSource.draw` promises, word for word.

    Args:
        leaves: the noise leaves, in the manifest's order.
        key: low 32 bits of the run's seed, and the client_index.
        actor_index: [N].
        episode_index: [N].
        step: [N], of the episode.

    Returns:
        Leaf name → float32 [N, width].
    """
    rows = len(step)
    wanted = [_blocks(leaf.width) if leaf.kind != "none" else 0 for leaf in leaves]
    total = sum(wanted)
    columns = [index.astype(np.uint64)[:, None] & _LOW_32 for index in (actor_index, episode_index, step)]
    counter = [np.broadcast_to(column, (rows, total)) for column in columns]
    counter.append(np.broadcast_to(np.arange(total, dtype=np.uint64), (rows, total)))
    words = np.stack(philox4x32(counter, key), axis=-1)  # [N, blocks, 4]
    noise: Noise = {}
    first = 0
    for leaf, count in zip(leaves, wanted, strict=True):
        if leaf.kind == "none":
            noise[leaf.name] = np.zeros((rows, leaf.width), np.float32)
        else:
            own = words[:, first : first + count].reshape(rows, -1)
            noise[leaf.name] = np.ascontiguousarray(_shape_noise(leaf.kind, own, leaf.width), np.float32)
        first += count
    return noise


@dataclass(slots=True)
class _Ahead:
    """Steps drawn ahead: row a holds `count[a]` steps of actor a from `first_step[a]` of `episode[a]` on."""

    leaves: tuple[NoiseLeaf, ...]
    steps: int
    max_actors: int
    count: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    episode: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    first_step: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [actors, steps, width]

    @classmethod
    def for_leaves(cls, leaves: Sequence[NoiseLeaf]) -> _Ahead:
        width = max(1, sum(_blocks(leaf.width) * _WORDS_PER_BLOCK for leaf in leaves))
        steps = max(1, min(_AHEAD_STEPS, _AHEAD_WORDS_PER_ACTOR // width))
        return cls(leaves=tuple(leaves), steps=steps, max_actors=_CACHE_WORDS // (steps * width))

    def grow(self, actors: int) -> None:
        """Room for at least so many actors; what is there stays."""
        have = len(self.episode)
        size = min(self.max_actors, max(actors, 2 * have))
        self.episode = np.concatenate([self.episode, np.full(size - have, -1, np.int64)])
        self.count = np.concatenate([self.count, np.zeros(size - have, np.int64)])
        self.first_step = np.concatenate([self.first_step, np.zeros(size - have, np.int64)])
        for leaf in self.leaves:
            values = np.zeros((size, self.steps, leaf.width), np.float32)
            if have:
                values[:have] = self.values[leaf.name]
            self.values[leaf.name] = values


class NoiseSource:
    """The noise of one client in one run. Thread-safe.

    Args:
        seed: the run's seed; its low 32 bits count.
        client_index: from the welcome.
    """

    def __init__(self, seed: int, client_index: int) -> None:
        self._key = (seed & 0xFFFFFFFF, client_index & 0xFFFFFFFF)
        self._lock = threading.Lock()
        self._ahead = _Ahead.for_leaves(())

    def zero(self, leaves: Sequence[NoiseLeaf], rows: int) -> Noise:
        """The noise of the greedy action: float32 zeros [rows, width] a leaf."""
        return {leaf.name: np.zeros((rows, leaf.width), np.float32) for leaf in leaves}

    def draw(
        self,
        leaves: Sequence[NoiseLeaf],
        actor_index: NDArray[np.int64],
        episode_index: NDArray[np.int64],
        step: NDArray[np.int64],
    ) -> Noise:
        """Noise of B actors at the given steps.

        Args:
            leaves: the noise leaves, in the manifest's order; pass the same tuple each time.
            actor_index: int64 [B].
            episode_index: int64 [B].
            step: int64 [B], of the episode.

        Returns:
            Leaf name → float32 [B, width], the caller's own.
        """
        with self._lock:
            ahead = self._ahead
            if leaves is not ahead.leaves and tuple(leaves) != ahead.leaves:
                ahead = self._ahead = _Ahead.for_leaves(leaves)
            if len(step) == 1:
                return self._draw_one(ahead, actor_index, episode_index, step)
            return self._draw_many(ahead, actor_index, episode_index, step)

    def _draw_one(
        self, ahead: _Ahead, actors: NDArray[np.int64], episodes: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> Noise:
        actor, step = int(actors[0]), int(steps[0])
        if actor < len(ahead.episode) and ahead.episode[actor] == episodes[0]:
            offset = step - int(ahead.first_step[actor])
            if 0 <= offset < ahead.count[actor]:
                return {
                    name: values[actor, offset : offset + 1].copy() for name, values in ahead.values.items()
                }
        return self._draw_many(ahead, actors, episodes, steps)

    def _draw_many(
        self, ahead: _Ahead, actors: NDArray[np.int64], episodes: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> Noise:
        highest = int(actors.max(initial=-1))
        if highest >= ahead.max_actors or not ahead.leaves:
            return draw_directly(ahead.leaves, self._key, actors, episodes, steps)
        if highest >= len(ahead.episode):
            ahead.grow(highest + 1)
        offset = steps - ahead.first_step[actors]
        missed = (ahead.episode[actors] != episodes) | (offset < 0) | (offset >= ahead.count[actors])
        if missed.any():
            if len(steps) <= _REFILL_TOGETHER_ROWS:
                missed[:] = True
            self._refill(ahead, actors[missed], episodes[missed], steps[missed])
            offset = steps - ahead.first_step[actors]
        return {name: values[actors, offset] for name, values in ahead.values.items()}

    def _refill(
        self, ahead: _Ahead, actors: NDArray[np.int64], episodes: NDArray[np.int64], steps: NDArray[np.int64]
    ) -> None:
        """Draws the next steps of these actors in one vector call."""
        rows = len(actors)
        count = min(ahead.steps, _AHEAD_STEPS_AT_FIRST) if int(steps.min()) == 0 else ahead.steps
        count = max(1, min(count, _AHEAD_ROWS // rows))
        window = (steps[:, None] + np.arange(count)).ravel()
        noise = draw_directly(ahead.leaves, self._key, actors.repeat(count), episodes.repeat(count), window)
        for name, values in noise.items():
            ahead.values[name][actors, :count] = values.reshape(rows, count, -1)
        ahead.count[actors] = count
        ahead.episode[actors] = episodes
        ahead.first_step[actors] = steps
