"""Noise: Philox4x32-10 by counter, the same however far ahead it is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from relayrl_shared.noise import NoiseSource, draw_directly, philox4x32
from relayrl_shared.policy.manifest import NoiseKind, NoiseLeaf


def leaf(kind: NoiseKind, width: int, path: str = "") -> NoiseLeaf:
    """A noise leaf of an action leaf of the same path."""
    return NoiseLeaf(name=f"noise{path}", action_leaf=f"action{path}", kind=kind, width=width)


def index(*values: int) -> NDArray[np.int64]:
    """An int64 array."""
    return np.array(values, np.int64)


HYBRID = (leaf("gumbel", 5, ".a"), leaf("normal", 3, ".b"), leaf("logistic", 4, ".c"), leaf("none", 2, ".d"))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_matches_its_authors_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: str
) -> None:
    """The known answers of Random123 for philox4x32-10."""
    words = philox4x32([np.array([word], np.uint64) for word in counter], key)

    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


def slow_noise(
    leaves: tuple[NoiseLeaf, ...], key: tuple[int, int], counter: tuple[int, int, int]
) -> list[list[float]]:
    """The definition, one number at a time."""
    block, result = 0, []
    for noise_leaf in leaves:
        numbers: list[float] = []
        while noise_leaf.kind != "none" and len(numbers) < noise_leaf.width:
            words = philox4x32([np.array([word], np.uint64) for word in (*counter, block)], key)
            uniform = [(int(word[0]) + 0.5) / 2**32 for word in words]
            block += 1
            if noise_leaf.kind == "gumbel":
                numbers += [-math.log(-math.log(u)) for u in uniform]
            elif noise_leaf.kind == "logistic":
                numbers += [math.log(u) - math.log1p(-u) for u in uniform]
            else:
                for first, second in (uniform[:2], uniform[2:]):
                    radius = math.sqrt(-2 * math.log(first))
                    numbers += [
                        radius * math.cos(2 * math.pi * second),
                        radius * math.sin(2 * math.pi * second),
                    ]
        result.append((numbers + [0.0] * noise_leaf.width)[: noise_leaf.width])
    return result


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 99),
    st.tuples(st.integers(0, 5000), st.integers(0, 2**33), st.integers(0, 9999)),
)
def test_follows_the_definition(seed: int, client: int, counter: tuple[int, int, int]) -> None:
    """Every leaf starts on a fresh block and is transformed as the protocol says."""
    noise = NoiseSource(seed, client).draw(HYBRID, *(index(number) for number in counter))

    wrapped = (counter[0], counter[1] % 2**32, counter[2])
    expected = slow_noise(HYBRID, (seed % 2**32, client), wrapped)
    for noise_leaf, numbers in zip(HYBRID, expected, strict=True):
        np.testing.assert_allclose(noise[noise_leaf.name][0], np.array(numbers, np.float32), rtol=1e-6)


def test_golden_values() -> None:
    """The numbers that docs/wire-protocol.md prints for other languages."""
    noise = NoiseSource(seed=7, client_index=1).draw(HYBRID[:3], index(2), index(3), index(4))

    golden = {name: [round(float(number), 6) for number in row[0]] for name, row in noise.items()}
    assert golden == {
        "noise.a": [0.314526, -0.733196, 1.596894, -0.370118, 0.940696],
        "noise.b": [0.48903, 0.587752, -0.131746],
        "noise.c": [1.679512, -1.560872, -0.167689, 1.739682],
    }


calls = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), min_size=1, max_size=20, unique=True),
        st.integers(0, 2),
        st.integers(0, 300),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(calls, st.sampled_from([HYBRID, HYBRID[:1], HYBRID[1:2]]))
def test_drawing_ahead_changes_nothing(
    made: list[tuple[list[int], int, int]], leaves: tuple[NoiseLeaf, ...]
) -> None:
    """Any order of calls, actors, episodes and steps gives the bits of a direct draw."""
    source = NoiseSource(11, 3)
    for actors, episode, step in made:
        rows = index(*actors), np.full(len(actors), episode), step + np.arange(len(actors)) % 3

        drawn, direct = source.draw(leaves, *rows), draw_directly(leaves, (11, 3), *rows)

        assert all(drawn[name].tobytes() == direct[name].tobytes() for name in direct)
        assert all(drawn[name].flags.c_contiguous for name in direct)


def test_actors_beyond_the_cache_are_drawn_directly() -> None:
    """An actor index that no cache has room for gets its noise all the same."""
    huge = index(2**40)

    noise = NoiseSource(0, 0).draw(HYBRID, huge, index(0), index(0))

    assert (
        noise["noise.a"].tobytes()
        == draw_directly(HYBRID, (0, 0), huge, index(0), index(0))["noise.a"].tobytes()
    )


def test_result_is_the_callers_own() -> None:
    """Writing into a result does not change what a resend draws."""
    source, row = NoiseSource(0, 0), (index(0), index(0), index(0))
    first = source.draw(HYBRID, *row)
    kept = first["noise.a"].copy()

    first["noise.a"][:] = 0

    np.testing.assert_array_equal(kept, source.draw(HYBRID, *row)["noise.a"])


def test_zero_is_zero() -> None:
    """The greedy action's noise is float32 zeros of the leaves' widths."""
    noise = NoiseSource(0, 0).zero(HYBRID, 3)

    assert {name: (row.shape, row.dtype.name, bool(row.any())) for name, row in noise.items()} == {
        each.name: ((3, each.width), "float32", False) for each in HYBRID
    }


@pytest.mark.parametrize(
    ("kind", "mean", "variance"),
    [("gumbel", 0.5772, math.pi**2 / 6), ("logistic", 0.0, math.pi**2 / 3), ("normal", 0.0, 1.0)],
)
def test_moments(kind: NoiseKind, mean: float, variance: float) -> None:
    """Mean and variance are those of the distribution."""
    steps = np.arange(4000)
    drawn = draw_directly((leaf(kind, 8),), (5, 0), steps * 0, steps * 0, steps)["noise"]

    assert abs(float(drawn.mean()) - mean) < 0.05
    assert abs(float(drawn.var()) / variance - 1) < 0.05
