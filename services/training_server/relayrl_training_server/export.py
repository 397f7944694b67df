"""Makes policy artefacts of a `PolicyModule`: the graph once an architecture, weights and golden a version.

Driven by the learner. `export_graph` takes seconds and is called once a process; `build_artefact` takes
milliseconds and is called at every publication. `engine.load_policy` reads what comes out.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save as save_safetensors

from relayrl_shared.errors import ArtefactError
from relayrl_shared.policy.artefact import digest
from relayrl_shared.policy.engine import run_unchecked
from relayrl_shared.policy.golden import encode_golden, random_inputs
from relayrl_shared.policy.graph import assemble, check_model, strip_data
from relayrl_shared.policy.interface import Arrays, Port, input_ports, output_ports
from relayrl_shared.policy.manifest import PolicyArtefact, PolicyManifest
from relayrl_training_server.policy_module import PolicyModule

OPSET = 20
IR_VERSION = 10
ROWS = "rows"  # name of the batch axis in the graph
GOLDEN_MARGIN = 1e-2
SMALLEST_MARGIN = 1e-4  # a hundred times what torch and ONNX Runtime differ by
GOLDEN_ROWS = 8  # of each kind: greedy and sampled
_GOLDEN_CANDIDATES = 256
_CHATTER = ("torch.onnx", "torch.export", "torch.__trace", "onnxscript", "onnx_ir")  # loggers
_TRIAL_ROWS = (1, 7)
_EXAMPLE_ROWS = 3  # neither 0 nor 1, which torch.export would take for constants


def export_graph(module: PolicyModule) -> bytes:
    """The acting graph as an ONNX file: every tensor of the module's state a parameter of its own name (H1).

    The bytes depend on the architecture alone: weights are left out, and so is what names this process. Takes
    seconds.

    Raises:
        ArtefactError: the exporter dropped, renamed, changed or folded a tensor, or used what an engine would
            refuse.
    """
    model = _export(module)
    _check_initializers(model, module)
    _fold_constants(model)
    _strip_traces(model)
    _name_ends(model, module)
    _leave_out_weights(model, module)
    check_model(model)
    graph = bytes(model.SerializeToString(deterministic=True))
    _check_swap(graph, module)
    return graph


def _export(module: PolicyModule) -> Any:
    inputs = _tensors(random_inputs(module, _EXAMPLE_ROWS))
    rows = torch.export.Dim(ROWS, min=1)
    was_training = module.training
    module.eval()
    try:
        with _silence(), torch.no_grad():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=(tuple({0: rows} for _ in inputs),),
                input_names=module.input_names,
                output_names=module.output_names,
                external_data=False,
                verbose=False,
            )
    finally:
        module.train(was_training)
    if program is None:
        raise ArtefactError("the ONNX exporter gave no program")
    return program.model_proto


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's progress, warnings and logs away from the learner's own output."""
    loggers = [logging.getLogger(name) for name in _CHATTER]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _check_initializers(model: Any, module: PolicyModule) -> None:
    """Fail unless every tensor of the state is an initializer of its name, shape and dtype, and in use."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    used = {name for node in model.graph.node for name in node.input}
    for name, tensor in module.state_dict().items():
        if name not in initializers or name not in used:
            raise ArtefactError(
                f"the exporter left {name} out of the graph: a swap of weights would not reach it"
            )
        found = initializers[name]
        shape = tuple(found.dims)
        dtype = helper.tensor_dtype_to_np_dtype(found.data_type)
        if shape != tuple(tensor.shape) or dtype != tensor.numpy().dtype:
            raise ArtefactError(
                f"the exporter made {name} {dtype} {shape}; the module has {tensor.dtype} {tensor.shape}"
            )


def _fold_constants(model: Any) -> None:
    """Compute what depends on constants alone (shapes, slice ends), so that a swap has less to load.

    Never on the module's tensors: those are initializers, and initializers are not touched (H1).
    """
    known: dict[str, Any] = {}
    kept = []
    for node in model.graph.node:
        if node.input and not all(name in known for name in node.input):
            kept.append(node)
            continue
        results = ReferenceEvaluator(node).run(None, {name: known[name] for name in node.input})
        known.update(zip(node.output, results, strict=True))
    used = dict.fromkeys(name for node in kept for name in node.input if name in known)
    used.update(dict.fromkeys(end.name for end in model.graph.output if end.name in known))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(known[name]), name) for name in used)


def _strip_traces(model: Any) -> None:
    """Drop what names this process, file paths or versions: equal architectures have equal digests."""
    model.producer_name, model.producer_version, model.doc_string = "relayrl", "", ""
    model.ir_version = IR_VERSION
    model.graph.name = "policy"
    model.graph.doc_string = ""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.quantization_annotation[:]
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"


def _name_ends(model: Any, module: PolicyModule) -> None:
    """State the ends' dtypes and shapes exactly, with one named axis."""
    for what, nodes, ports in (
        ("inputs", model.graph.input, input_ports(module)),
        ("outputs", model.graph.output, output_ports(module)),
    ):
        found = [(node.name, node.type.tensor_type.elem_type) for node in nodes]
        wanted = [(port.name, _element_type(port)) for port in ports]
        if found != wanted:
            raise ArtefactError(f"the exporter gave the {what} {found}; expected were {wanted}")
        for node, port in zip(nodes, ports, strict=True):
            node.CopyFrom(helper.make_tensor_value_info(port.name, _element_type(port), [ROWS, *port.shape]))


def _element_type(port: Port) -> int:
    return int(
        helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=getattr(torch, port.dtype)).numpy().dtype)
    )


def _leave_out_weights(model: Any, module: PolicyModule) -> None:
    state = module.state_dict()
    for tensor in model.graph.initializer:
        if tensor.name in state:
            strip_data(tensor)
    ordered = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in ordered]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)


def _check_swap(graph: bytes, module: PolicyModule) -> None:
    """Swap other weights in and compare with the module: what was folded would be stale and differ (H1)."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    model = assemble(graph, weights_bytes(other))
    for rows in _TRIAL_ROWS:
        inputs = random_inputs(other, rows, seed=rows)
        tensors = dict(zip(inputs, _tensors(inputs), strict=True))
        clear = (_margin(other, tensors) > SMALLEST_MARGIN).numpy()
        expected = _act(other, tensors)
        for name, actual in run_unchecked(model, inputs).items():
            wanted = expected[name].numpy()
            same = actual.shape == wanted.shape
            if not same or not np.allclose(actual[clear], wanted[clear], rtol=1e-3, atol=1e-3):
                raise ArtefactError(f"{name} does not follow a swap of weights: something was folded")


def weights_bytes(module: PolicyModule) -> bytes:
    """Every tensor of the module's state as safetensors, by its own name."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return bytes(save_safetensors(state))


def golden_vectors(module: PolicyModule, seed: int = 0) -> bytes:
    """What this version does with inputs whose choice is clear: greedy rows first, sampled rows after (H4).

    A policy that finds no input clear (all logits equal) gets sampled rows only. In large action spaces some
    part is always close: then rows of a smaller margin serve, still far above rounding.

    Raises:
        ArtefactError: its outputs are not finite, or no row at all is clear.
    """
    greedy = random_inputs(module, _GOLDEN_CANDIDATES, seed)
    for noise in module.noise:
        greedy[noise.name][:] = 0
    sampled = random_inputs(module, _GOLDEN_CANDIDATES, seed + 1)
    clear = [_clear_rows(module, greedy), _clear_rows(module, sampled)]
    inputs = {name: torch.cat([part[name] for part in clear]) for name in module.input_names}
    outputs = _act(module, inputs)
    bad = [name for name, tensor in outputs.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ArtefactError(f"the policy's {bad} are not finite: its weights hold NaN or overflow")
    if not len(next(iter(outputs.values()))):
        raise ArtefactError(
            "no input gives this policy a clear choice; its golden vectors would prove nothing"
        )
    return encode_golden(_arrays(inputs), _arrays(outputs))


def _clear_rows(module: PolicyModule, inputs: Arrays) -> dict[str, torch.Tensor]:
    """The clearest rows; those below the margin of H4 only where a large action space leaves no other."""
    tensors = dict(zip(inputs, _tensors(inputs), strict=True))
    best = _margin(module, tensors).topk(GOLDEN_ROWS)
    # `not <=` keeps NaN rows, so that broken weights are reported as such.
    enough = ~(best.values <= GOLDEN_MARGIN)
    rows = best.indices[enough if bool(enough.any()) else best.values > SMALLEST_MARGIN]
    return {name: tensor[rows] for name, tensor in tensors.items()}


def _margin(module: PolicyModule, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return module.margin(*(inputs[name] for name in module.input_names))


def _act(module: PolicyModule, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs = module(*(inputs[name] for name in module.input_names))
    return dict(zip(module.output_names, outputs, strict=True))


def _tensors(arrays: Arrays) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays.values())


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def build_artefact(
    module: PolicyModule,
    graph: bytes,
    *,
    policy: str,
    run_id: str,
    lineage_id: str,
    learner_update: int,
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    policy_version: int | None = None,
    parent_version: int | None = None,
    store_cursor: int = 0,
    metrics: Mapping[str, float] | None = None,
    created_at: float | None = None,
) -> PolicyArtefact:
    """The artefact of the module's weights as they are now; `graph` is from `export_graph`.

    Args:
        module: its weights are read, not kept.
        graph: the exported graph.
        policy: name of the policy.
        run_id: the run that it was learned in.
        lineage_id: of the checkpoint line.
        learner_update: finished updates.
        algorithm: its name.
        hyperparameters: of the run, complete.
        policy_version: None until the registry gives one.
        parent_version: the version before, if known.
        store_cursor: position in the run's log up to which it learned.
        metrics: of the update, for people.
        created_at: Unix seconds; None is now.

    Raises:
        ArtefactError: the policy's outputs are not finite.
    """
    weights, golden = weights_bytes(module), golden_vectors(module)
    manifest = PolicyManifest(
        policy=policy,
        policy_version=policy_version,
        run_id=run_id,
        lineage_id=lineage_id,
        learner_update=learner_update,
        parent_version=parent_version,
        algorithm=algorithm,
        hyperparameters=dict(hyperparameters),
        observation_spec=module.observation_spec,
        action_spec=module.action_spec,
        masked_leaves=module.masked_leaves,
        allow_nan=module.allow_nan,
        noise=module.noise,
        outputs=module.outputs,
        graph_digest=digest(graph),
        weights_digest=digest(weights),
        golden_digest=digest(golden),
        store_cursor=store_cursor,
        metrics=dict(metrics or {}),
        created_at=time.time() if created_at is None else created_at,
    )
    return PolicyArtefact(manifest=manifest, graph=graph, weights=weights, golden=golden)
