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
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
_WORDS_PER_BLOCK = 4

_AHEAD_STEPS = 64
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
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (product_1 >> _SHIFT_32) ^ c1 ^ np.uint64(k0)
        c2 = (product_0 >> _SHIFT_32) ^ c3 ^ np.uint64(k1)
        c1, c3 = product_1 & _LOW_32, product_0 & _LOW_32
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _shape_noise(kind: NoiseKind, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uniforms [N, blocks, 4] in the open unit interval as noise [N, blocks * 4]."""
    rows = uniform.shape[0]
    if kind == "gumbel":
        noise = -np.log(-np.log(uniform))
    elif kind == "logistic":
        noise = np.log(uniform) - np.log1p(-uniform)
    else:
        radius = np.sqrt(-2.0 * np.log(uniform[:, :, 0::2]))
        angle = 2.0 * np.pi * uniform[:, :, 1::2]
        noise = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return noise.reshape(rows, -1)


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
    words = np.stack(philox4x32(counter, key), axis=-1)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    noise: Noise = {}
    first = 0
    for leaf, count in zip(leaves, wanted, strict=True):
        if leaf.kind == "none":
            noise[leaf.name] = np.zeros((rows, leaf.width), np.float32)
        else:
            shaped = _shape_noise(leaf.kind, uniform[:, first : first + count])
            noise[leaf.name] = np.ascontiguousarray(shaped[:, : leaf.width], dtype=np.float32)
        first += count
    return noise


@dataclass(slots=True)
class _Ahead:
    """Steps drawn ahead: row a holds `steps` steps of actor a from `first_step[a]` of `episode[a]` on."""

    leaves: tuple[NoiseLeaf, ...]
    steps: int
    max_actors: int
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
            if 0 <= offset < ahead.steps:
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
        missed = (ahead.episode[actors] != episodes) | (offset < 0) | (offset >= ahead.steps)
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
        window = (steps[:, None] + np.arange(ahead.steps)).ravel()
        noise = draw_directly(
            ahead.leaves, self._key, actors.repeat(ahead.steps), episodes.repeat(ahead.steps), window
        )
        for name, values in noise.items():
            ahead.values[name][actors] = values.reshape(rows, ahead.steps, -1)
        ahead.episode[actors] = episodes
        ahead.first_step[actors] = steps
