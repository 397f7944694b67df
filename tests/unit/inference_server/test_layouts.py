"""Packed frames of many requests become one array a leaf, and back, exactly as the wire packs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from relayrl_inference_server.layouts import check_leaves, layout_of
from relayrl_shared import frames
from relayrl_shared.errors import SpecMismatch
from relayrl_shared.messages import LeafHeader
from relayrl_shared.policy.interface import Port

PORTS = (
    Port("observation.camera", "uint8", (3, 5)),
    Port("observation.speed", "float32", ()),
    Port("action_mask", "bool", (3,)),
    Port("noise", "float64", (2,)),
)


def leaves(rows: int, seed: int) -> dict[str, NDArray[Any]]:
    """Random arrays of the ports."""
    random = np.random.default_rng(seed)
    return {
        port.name: random.integers(0, 2, (rows, *port.shape)).astype(port.dtype)
        if port.dtype == "bool"
        else (random.random((rows, *port.shape)) * 200).astype(port.dtype)
        for port in PORTS
    }


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.permutations(range(len(PORTS))))
def test_gather_stacks_the_frames_that_the_wire_packs(rows: int, count: int, order: list[int]) -> None:
    """Whatever the order of the leaves, each array is the requests' arrays one after another."""
    arrays = [leaves(rows, seed) for seed in range(count)]
    packed = [
        frames.pack_leaves({PORTS[index].name: values[PORTS[index].name] for index in order})
        for values in arrays
    ]
    layout = check_leaves(PORTS, packed[0][0], rows)
    gathered = layout.gather([memoryview(frame) for _, frame in packed])

    assert list(gathered) == [port.name for port in PORTS]
    for name, array in gathered.items():
        expected = np.concatenate([values[name] for values in arrays])
        assert array.dtype == expected.dtype
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5))
def test_scatter_makes_the_frames_that_the_wire_packs(rows: int, count: int) -> None:
    """Headers and bytes of every reply are what `frames.pack_leaves` gives for its rows."""
    arrays = [leaves(rows, seed) for seed in range(count)]
    stacked = {port.name: np.concatenate([values[port.name] for values in arrays]) for port in PORTS}
    layout = layout_of(PORTS, rows)
    scattered = layout.scatter(stacked, count)

    for values, frame in zip(arrays, scattered, strict=True):
        headers, expected = frames.pack_leaves(values)
        assert layout.headers == headers
        assert bytes(frame) == expected


def test_leaf_without_elements_takes_no_bytes() -> None:
    """A shape with a zero in it travels both ways."""
    ports = (Port("observation", "float32", (0,)), Port("noise", "float32", (2,)))
    layout = layout_of(ports, 3)
    noise = np.arange(6, dtype=np.float32).reshape(3, 2)
    frame = layout.scatter({"observation": np.zeros((3, 0), np.float32), "noise": noise}, 1)[0]
    gathered = layout.gather([frame, frame])

    assert gathered["observation"].shape == (6, 0)
    np.testing.assert_array_equal(gathered["noise"], np.concatenate([noise, noise]))


GOOD = tuple(LeafHeader(port.name, port.dtype, (2, *port.shape)) for port in PORTS)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (GOOD[1:], "observation.camera is missing"),
        (GOOD[:-1], "noise is missing; zeros give the greedy action"),
        ((), "observation.camera is missing"),
        ((*GOOD, LeafHeader("extra", "bool", (2,))), "takes no 'extra'"),
        ((*GOOD, GOOD[0]), "announced twice"),
        ((LeafHeader("observation.camera", "int8", (2, 3, 5)), *GOOD[1:]), "camera is int8"),
        ((LeafHeader("observation.camera", "uint8", (2, 5, 3)), *GOOD[1:]), r"expected uint8\[2, 3, 5\]"),
        ((LeafHeader("observation.camera", "uint8", (3, 3, 5)), *GOOD[1:]), r"is uint8\[3, 3, 5\]"),
        ((LeafHeader("observation.camera", "uint8", ()), *GOOD[1:]), r"is uint8\[\]"),
    ],
)
def test_leaves_that_the_policy_does_not_take_are_refused_by_name(
    headers: tuple[LeafHeader, ...], message: str
) -> None:
    """The error names the leaf and what was expected."""
    with pytest.raises(SpecMismatch, match=message):
        check_leaves(PORTS, headers, 2)
