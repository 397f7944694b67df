"""Where leaves lie in packed frames: many requests become one array a leaf, and one array many replies.

Layouts are worked out once: peers repeat few, so that a request of a known layout costs a dictionary look-up
and its share of a join. Driven by `acting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import SpecMismatch
from relayrl_shared.frames import LEAF_ALIGNMENT_BYTES
from relayrl_shared.messages import LeafHeader
from relayrl_shared.policy.interface import Port

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """One leaf in a frame of `rows` rows: its array is [rows, *shape]."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def view(self, frames: Any, count: int, frame_bytes: int) -> NDArray[Any]:
        """The leaf of `count` frames that lie one after another: [count, rows, *shape], not copied."""
        strides = (frame_bytes, *self.strides)
        return np.ndarray((count, *self.shape), self.dtype, frames, self.offset, strides)


@dataclass(frozen=True, slots=True)
class Layout:
    """A packed frame of `rows` rows."""

    rows: int
    headers: tuple[LeafHeader, ...]
    places: tuple[Place, ...]
    frame_bytes: int

    def gather(self, frames: Sequence[memoryview]) -> Arrays:
        """The leaves of many frames of this layout: each [len(frames) * rows, *shape], contiguous."""
        count = len(frames)
        if count == 1:
            return {
                place.name: np.ndarray(place.shape, place.dtype, frames[0], place.offset)
                for place in self.places
            }
        joined = b"".join(frames)
        rows = count * self.rows
        return {
            place.name: np.ascontiguousarray(
                place.view(joined, count, self.frame_bytes).reshape(rows, *place.shape[1:])
            )
            for place in self.places
        }

    def scatter(self, arrays: Mapping[str, NDArray[Any]], count: int) -> list[memoryview]:
        """The packed frames of `count` replies out of arrays of [count * rows, *shape]."""
        packed = bytearray(count * self.frame_bytes)
        for place in self.places:
            target = place.view(packed, count, self.frame_bytes)
            target[...] = arrays[place.name].reshape(target.shape)
        view, size = memoryview(packed), self.frame_bytes
        return [view[start : start + size] for start in range(0, len(packed), size)]


def layout_of(ports: Sequence[Port], rows: int, order: Sequence[str] | None = None) -> Layout:
    """The frame of these leaves; `order` is the order of their names in the frame."""
    by_name = {port.name: port for port in ports}
    headers, places, offset = [], {}, 0
    for name in order if order is not None else by_name:
        port = by_name[name]
        shape, dtype = (rows, *port.shape), np.dtype(port.dtype)
        headers.append(LeafHeader(name, port.dtype, shape))
        places[name] = Place(name, dtype, shape, offset, _strides(shape, dtype.itemsize))
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        offset += -(-size // LEAF_ALIGNMENT_BYTES) * LEAF_ALIGNMENT_BYTES
    return Layout(rows, tuple(headers), tuple(places[port.name] for port in ports), offset)


def check_leaves(ports: Sequence[Port], leaves: Sequence[LeafHeader], rows: int) -> Layout:
    """The layout of a request that announces exactly the leaves that a policy takes.

    Raises:
        SpecMismatch: a leaf is missing, unknown, announced twice, or of another shape or dtype; names it.
    """
    names = [leaf.name for leaf in leaves]
    wanted = [port.name for port in ports]
    missing = [name for name in wanted if name not in names]
    unknown = [name[:80] for name in names if name not in wanted]
    if missing or unknown or len(names) != len(wanted):
        raise SpecMismatch(_describe_names(missing, unknown, wanted))
    ports_by_name = {port.name: port for port in ports}
    for leaf in leaves:
        port = ports_by_name[leaf.name]
        if leaf.dtype != port.dtype or leaf.shape != (rows, *port.shape):
            raise SpecMismatch(
                f"{leaf.name} is {leaf.dtype[:40]}{list(leaf.shape[:16])}, "
                f"expected {port.dtype}{[rows, *port.shape]}"
            )
    return layout_of(ports, rows, names)


def _describe_names(missing: list[str], unknown: list[str], wanted: list[str]) -> str:
    if missing:
        hint = "; zeros give the greedy action" if missing[0].startswith("noise") else ""
        return f"{missing[0]} is missing{hint}; the policy takes {', '.join(wanted)}"
    if unknown:
        return f"the policy takes no {unknown[0]!r}; it takes {', '.join(wanted)}"
    return f"a leaf is announced twice; the policy takes {', '.join(wanted)}, each once"


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = [itemsize]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides))
