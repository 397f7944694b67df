"""Loads policy versions into ONNX Runtime and runs them: one thread, no torch, nothing trusted unchecked.

Driven by the client's local inference, the inference server and, before it publishes, the learner.
`load_policy(artefact, previous=loaded)` reuses the parsed graph where the digest is the same, so that a swap
costs a copy of the weights and a new session.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from relayrl_shared.errors import ArtefactError, GoldenMismatch, InferenceError
from relayrl_shared.policy.artefact import check_digests, describe
from relayrl_shared.policy.golden import decode_golden
from relayrl_shared.policy.graph import GraphTemplate, decode_tensors, fill, parse_template
from relayrl_shared.policy.interface import Port, input_ports, output_ports
from relayrl_shared.policy.manifest import PolicyArtefact, PolicyManifest

GOLDEN_TOLERANCE = 1e-4
_LOG_ERRORS_ONLY = 4  # fatal: everything below arrives as an exception

_ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
}


class LoadedPolicy:
    """A policy version that can act. Immutable; `run` may be called from several threads.

    Attributes: manifest; policy_version (None before publication); learner_update; input_names and
    output_names in graph order; session, the ONNX Runtime session; template, the parsed graph that the next
    version reuses.
    """

    __slots__ = (
        "_checked_pairs",
        "_session_run",
        "input_names",
        "inputs",
        "learner_update",
        "manifest",
        "output_names",
        "outputs",
        "policy_version",
        "session",
        "template",
    )

    def __init__(self, manifest: PolicyManifest, session: Any, template: GraphTemplate) -> None:
        self.manifest = manifest
        self.template = template
        self.session = session
        self.policy_version = manifest.policy_version
        self.learner_update = manifest.learner_update
        self.inputs = input_ports(manifest)
        self.outputs = output_ports(manifest)
        self.input_names: list[str] = [port.name for port in self.inputs]
        self.output_names: list[str] = [port.name for port in self.outputs]
        self._checked_pairs = _pairs_to_check(self.outputs)
        self._session_run: Callable[..., Sequence[Any]] = session.run

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Act on a batch.

        Args:
            inputs: one array [rows, *shape] for each name of `input_names`, rows >= 1 and equal, dtypes as
                the manifest says. Masks must have been checked: one that allows nothing would give action 0.

        Returns:
            One array [rows, *shape] for each name of `output_names`.

        Raises:
            InferenceError: an input is missing or wrong, ONNX Runtime failed, or the log-prob, the value or
                an action is not finite. It names the version.
        """
        try:
            rows = _common_rows(self.input_names, inputs)
            arrays = self._session_run(self.output_names, inputs)
            # A dot product is not finite if an element is not, and ten times cheaper than isfinite().all().
            for one, other in self._checked_pairs:
                if not math.isfinite(np.vdot(arrays[one], arrays[other])):
                    self._check_exactly(arrays)
        except InferenceError:
            raise
        except Exception as error:
            raise InferenceError(f"{describe(self.manifest)} could not act: {error}") from error
        if len(arrays[0]) != rows:
            raise InferenceError(f"{describe(self.manifest)} gave {len(arrays[0])} rows for {rows}")
        return dict(zip(self.output_names, arrays, strict=True))

    def _check_exactly(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Large but finite numbers overflow the quick check."""
        for position in {position for pair in self._checked_pairs for position in pair}:
            array = arrays[position]
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
            if bad.size:
                raise InferenceError(
                    f"{describe(self.manifest)} gave a {self.output_names[position]} that is not finite in "
                    f"rows {bad[:8].tolist()}: the observation or the weights hold NaN or overflow"
                )


def _common_rows(names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> int:
    rows = len(inputs[names[0]])
    for name in names:
        if len(inputs[name]) != rows:  # broadcasting would hide it
            raise ValueError(f"{name} has {len(inputs[name])} rows, {names[0]} has {rows}")
    if rows < 1:
        raise ValueError("there are no rows")
    return rows


def _pairs_to_check(ports: Sequence[Port]) -> list[tuple[int, int]]:
    """Pairs of outputs that show whether all rows are sound: log-prob and value, else the float actions.

    A NaN in a mean or a logit always reaches the joint log-prob.
    """
    at = {port.name: position for position, port in enumerate(ports)}
    summaries = [at[name] for name in ("behaviour_log_prob", "value") if name in at]
    if "behaviour_log_prob" in at:
        return [(summaries[0], summaries[-1])]
    floats = [at[port.name] for port in ports if port.name.startswith("action") and "float" in port.dtype]
    return [(position, position) for position in summaries + floats]


def load_policy(artefact: PolicyArtefact, *, previous: LoadedPolicy | None = None) -> LoadedPolicy:
    """Load a version: check it, swap its weights into the graph, and see it reproduce its golden vectors.

    Args:
        artefact: what was fetched; nothing in it is trusted.
        previous: a version loaded before; its parsed graph is used again if the graph's digest is the same.

    Raises:
        DigestMismatch: graph, weights or golden vectors do not hash to the manifest's digests.
        ArtefactError: graph or weights are not what the manifest says, or not safe (contracts H1, H6).
        GoldenMismatch: it runs, but not as it ran where it was made.
    """
    manifest = artefact.manifest
    check_digests(artefact)
    template = _template(artefact, previous)
    model = fill(template, decode_tensors(artefact.weights, "the weights file"))
    session = _session(model, manifest)
    _check_interface(session, manifest)
    loaded = LoadedPolicy(manifest, session, template)
    _check_golden(loaded, artefact.golden)
    return loaded


def _template(artefact: PolicyArtefact, previous: LoadedPolicy | None) -> GraphTemplate:
    if previous is not None and previous.template.digest == artefact.manifest.graph_digest:
        return previous.template
    return parse_template(artefact.graph, artefact.manifest.graph_digest)


def session_options() -> Any:
    """One thread, sequential, no spinning, silent: a process may hold many of these (contracts K4)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Weights outside the arena, so that it holds activations only and a swap gives the old weights back.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


def _session(model: bytes, manifest: PolicyManifest) -> Any:
    try:
        return onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtefactError(f"ONNX Runtime refuses the graph of {describe(manifest)}: {error}") from error


def _check_interface(session: Any, manifest: PolicyManifest) -> None:
    for what, expected, actual in (
        ("input", input_ports(manifest), session.get_inputs()),
        ("output", output_ports(manifest), session.get_outputs()),
    ):
        found = [node.name for node in actual]
        wanted = [port.name for port in expected]
        if found != wanted:
            raise ArtefactError(f"the graph's {what}s are {found}; the manifest says {wanted}")
        for port, node in zip(expected, actual, strict=True):
            _check_port(what, port, node)


def _check_port(what: str, port: Port, node: Any) -> None:
    dtype = _ORT_DTYPES.get(node.type, node.type)
    shape = list(node.shape)
    # Inputs must state their shape, since ONNX Runtime then checks each call; inference may lose an output's.
    exact = what == "input"
    fits = len(shape) == 1 + len(port.shape) and all(
        have == want or (not exact and not isinstance(have, int))
        for have, want in zip(shape[1:], port.shape, strict=True)
    )
    if dtype != port.dtype or not fits or isinstance(shape[0], int):
        raise ArtefactError(
            f"{what} {port.name} of the graph is {dtype} {shape}; "
            f"the manifest says {port.dtype} [rows, {', '.join(map(str, port.shape))}]"
        )


def _check_golden(loaded: LoadedPolicy, golden: bytes) -> None:
    inputs, expected = decode_golden(golden)
    if inputs.keys() != set(loaded.input_names) or expected.keys() != set(loaded.output_names):
        raise ArtefactError(
            f"the golden vectors are of {sorted(inputs)} and {sorted(expected)}, not this graph"
        )
    try:
        outputs = loaded.run(inputs)
    except InferenceError as error:
        raise GoldenMismatch(f"the golden inputs cannot be run: {error}") from error
    for name, actual in outputs.items():
        _compare(name, actual, expected[name], loaded.manifest)


def _compare(name: str, actual: NDArray[Any], expected: NDArray[Any], manifest: PolicyManifest) -> None:
    who = describe(manifest)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise GoldenMismatch(
            f"{who}: {name} is {actual.dtype} {actual.shape}, golden {expected.dtype} {expected.shape}"
        )
    if actual.dtype.kind != "f":
        if not np.array_equal(actual, expected):
            raise GoldenMismatch(f"{who}: {name} differs from its golden vector")
    elif not np.allclose(actual, expected, rtol=GOLDEN_TOLERANCE, atol=GOLDEN_TOLERANCE):
        worst = float(np.max(np.abs(actual.astype(np.float64) - expected)))
        raise GoldenMismatch(f"{who}: {name} differs from its golden vector by up to {worst:g}")


def run_unchecked(model: bytes, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run a self-contained model once, without manifest or checks: for whoever makes golden vectors.

    Raises:
        ArtefactError: ONNX Runtime refuses the model or the inputs.
    """
    try:
        session = onnxruntime.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:
        raise ArtefactError(f"the model cannot be run: {error}") from error
