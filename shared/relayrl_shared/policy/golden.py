"""Golden vectors: inputs and outputs that travel with a policy version and prove that it runs as it was made.

The exporter writes them, `engine.load_policy` checks them; `random_inputs` draws inputs that a policy takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from relayrl_shared.errors import ArtefactError
from relayrl_shared.policy.graph import decode_tensors
from relayrl_shared.policy.interface import ActingInterface, Arrays, input_ports
from relayrl_shared.policy.manifest import NoiseKind
from relayrl_shared.spaces import LeafSpec, mask_leaf_name


def encode_golden(inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> bytes:
    """The golden file: safetensors of `in/<name>` and `out/<name>`, one array [rows, *shape] each."""
    vectors = {f"in/{name}": np.ascontiguousarray(array) for name, array in inputs.items()}
    vectors |= {f"out/{name}": np.ascontiguousarray(array) for name, array in outputs.items()}
    return bytes(save_safetensors(vectors))


def decode_golden(golden: bytes) -> tuple[Arrays, Arrays]:
    """Inputs and outputs of a golden file, by graph name.

    Raises:
        ArtefactError: it does not parse, or holds something else.
    """
    sides: dict[str, Arrays] = {"in": {}, "out": {}}
    for key, array in decode_tensors(golden, "the golden vectors").items():
        side, _, name = key.partition("/")
        if side not in sides:
            raise ArtefactError(f"the golden vectors hold {key!r}, which is neither an input nor an output")
        sides[side][name] = array
    return sides["in"], sides["out"]


def random_inputs(interface: ActingInterface, rows: int, seed: int = 0) -> Arrays:
    """Inputs of a policy's graph: observations inside the spec, valid masks, noise of its kind.

    Returns: one array [rows, *shape] for each input of the graph, in its order.
    """
    random = np.random.default_rng(seed)
    leaves = {leaf.name: leaf for leaf in interface.observation_spec.leaves}
    masked = {mask_leaf_name(leaf.name): leaf for leaf in interface.action_spec.leaves}
    noise = {leaf.name: leaf for leaf in interface.noise}
    inputs: Arrays = {}
    for port in input_ports(interface):
        if port.name in leaves:
            inputs[port.name] = _random_leaf(leaves[port.name], rows, random)
        elif port.name in masked:
            inputs[port.name] = _random_mask(masked[port.name], rows, random)
        else:
            inputs[port.name] = _random_noise(noise[port.name].kind, (rows, *port.shape), random)
    return inputs


def _random_leaf(leaf: LeafSpec, rows: int, random: np.random.Generator) -> NDArray[Any]:
    low, high = leaf.bounds()
    shape = (rows, *leaf.shape)
    if leaf.numpy_dtype.kind == "f":
        return np.clip(random.normal(size=shape), low, high).astype(leaf.dtype)
    limited = [np.clip(bound.astype(np.float64), -1000, 1000).astype(np.int64) for bound in (low, high)]
    return random.integers(limited[0], limited[1] + 1, shape).astype(leaf.dtype)


def _random_mask(leaf: LeafSpec, rows: int, random: np.random.Generator) -> NDArray[np.bool_]:
    groups = (2,) * leaf.size if leaf.kind == "multi_binary" else leaf.nvec
    parts = []
    for count in groups:
        part = random.random((rows, count)) < 0.6
        part[np.arange(rows), random.integers(0, count, rows)] = True
        parts.append(part)
    return np.concatenate(parts, axis=1).reshape(rows, *(leaf.mask_shape or ()))


def _random_noise(
    kind: NoiseKind, shape: tuple[int, ...], random: np.random.Generator
) -> NDArray[np.float32]:
    draw = {"gumbel": random.gumbel, "logistic": random.logistic, "normal": random.normal}
    if kind == "none":
        return np.zeros(shape, np.float32)
    return draw[kind](size=shape).astype(np.float32)
