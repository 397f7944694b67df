"""Acting by a policy artefact: `LoadedPolicy.run` against bare ONNX Runtime and an eager torch forward.

All three run the same weights on the same inputs, sampling and log-probs included, and their answers are
compared before anything is timed. Also: the time of an export and of a swap to the next version.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from harness import Options, Report, interleave, parse_options

from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.policy.golden import random_inputs
from relayrl_shared.policy.interface import Arrays
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_training_server.export import build_artefact, export_graph
from relayrl_training_server.policy_module import PolicyModule

RUN_TARGETS = {1: 1.5, 32: 1.5, 1024: 1.5}
OBSERVATION = ObservationSpec(leaves=(LeafSpec(name="observation", kind="box", shape=(4,), dtype="float32"),))
ACTION = ActionSpec(
    leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(2,), start=(0,)),)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse_options(__doc__ or "", arguments)
    torch.set_num_threads(1)
    report = Report("policy_engine", options)
    module = PolicyModule(OBSERVATION, ACTION, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    graph = export_graph(module)
    report.figure("export", time.perf_counter() - started, "seconds", graph_bytes=len(graph))
    policy = _measure_swap(report, module, graph)
    for rows, target in RUN_TARGETS.items():
        _measure_run(report, options, policy, module, rows, target)
    return report.status()


def _measure_swap(report: Report, module: PolicyModule, graph: bytes) -> LoadedPolicy:
    artefact = build_artefact(
        module,
        graph,
        policy="benchmark",
        run_id="benchmark",
        lineage_id="benchmark",
        learner_update=0,
        algorithm="ppo",
        hyperparameters={},
    )
    policy = load_policy(artefact)
    contenders = {
        "first_load": lambda: load_policy(artefact),
        "swap": lambda: load_policy(artefact, previous=policy),
    }
    timings = interleave(contenders, rounds=3 if report.options.quick else 15, calls=5)
    for name, timing in timings.items():
        report.figure(
            name, timing.seconds * 1e3, "milliseconds", fastest=round(timing.fastest_seconds * 1e3, 3)
        )
    return policy


def _measure_run(
    report: Report, options: Options, policy: LoadedPolicy, module: PolicyModule, rows: int, target: float
) -> None:
    inputs = random_inputs(module, rows, seed=rows)
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    bare, names = policy.session.run, policy.output_names

    def eager() -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            return module(*tensors)  # type: ignore[no-any-return]

    _verify(policy, module, inputs, bare(names, inputs), eager())
    timings = interleave(
        {"bare": lambda: bare(names, inputs), "run": lambda: policy.run(inputs), "torch": eager},
        rounds=5 if options.quick else 21,
        calls=max(10, (300 if options.quick else 2000) // max(1, rows // 16)),
    )
    for name, timing in timings.items():
        report.figure(
            f"{name}_{rows}",
            timing.seconds * 1e6,
            "microseconds",
            rows=rows,
            fastest=round(timing.fastest_seconds * 1e6, 2),
        )
    report.ratio(f"run_to_bare_{rows}", timings["run"].seconds / timings["bare"].seconds, at_most=target)
    report.ratio(f"torch_to_run_{rows}", timings["torch"].seconds / timings["run"].seconds, at_least=1.0)


def _verify(
    policy: LoadedPolicy,
    module: PolicyModule,
    inputs: Arrays,
    bare: Sequence[np.ndarray],
    eager: Sequence[torch.Tensor],
) -> None:
    """All three must give the same actions and, within rounding, the same numbers."""
    outputs = policy.run(inputs)
    for name, array, tensor in zip(policy.output_names, bare, eager, strict=True):
        np.testing.assert_array_equal(outputs[name], array)
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    sys.exit(main())
