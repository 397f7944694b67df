"""A loaded version under batches of good and bad requests, without a socket."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from relayrl_inference_server.acting import Answer, Question, ServedPolicy
from relayrl_inference_server.layouts import layout_of
from relayrl_shared import frames
from relayrl_shared.errors import (
    ContractError,
    FrameError,
    InferenceError,
    InvalidActionMask,
    InvalidObservation,
    RelayRLError,
    SpecMismatch,
)
from relayrl_shared.messages import RequestActions
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact, random_inputs

OBSERVATION = ObservationSpec(
    leaves=(
        LeafSpec(name="observation.position", kind="box", shape=(3,), dtype="float32"),
        LeafSpec(name="observation.mode", kind="discrete", shape=(), dtype="int64", nvec=(4,), start=(0,)),
    )
)
ACTION = ActionSpec(
    leaves=(
        LeafSpec(name="action.move", kind="discrete", shape=(), dtype="int64", nvec=(3,), start=(0,)),
        LeafSpec(name="action.force", kind="box", shape=(2,), dtype="float32", low=(-1.0,), high=(1.0,)),
    )
)
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def loaded() -> LoadedPolicy:
    """A policy with a mask, a hybrid action and a discrete observation leaf."""
    artefact = make_artefact(
        OBSERVATION, ACTION, policy="p", policy_version=7, learner_update=6, masked_leaves=("action.move",)
    )
    return load_policy(artefact)


@pytest.fixture
def served(loaded: LoadedPolicy) -> ServedPolicy:
    """The policy as the server uses it, with forwards of at most 16 rows."""
    return ServedPolicy(loaded, max_batch_rows=16)


def inputs(loaded: LoadedPolicy, rows: int, seed: int) -> Arrays:
    """Valid inputs."""
    return random_inputs(loaded.manifest, rows, seed)


def question(served: ServedPolicy, arrays: Arrays) -> Question:
    """The question that a request with these leaves makes."""
    headers, frame = frames.pack_leaves(arrays)
    rows = len(next(iter(arrays.values())))
    return served.question(RequestActions(policy="p", rows=rows, leaves=headers), memoryview(frame))


def assert_acts(answer: Answer | RelayRLError, expected: Arrays) -> None:
    """The reply holds what the policy gives for the request alone."""
    assert isinstance(answer, Answer), answer
    found = frames.unpack_leaves(answer.message.leaves, answer.frame)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_batch_of_many_sizes_gives_each_request_its_own_rows(
    served: ServedPolicy, loaded: LoadedPolicy
) -> None:
    """Requests of 1, 3, 1, 2 and 3 rows share a forward and get what they would get alone, in order."""
    arrays = [inputs(loaded, rows, seed) for seed, rows in enumerate((1, 3, 1, 2, 3))]
    answers = served.act([question(served, values) for values in arrays])

    assert len(answers) == 5
    for answer, values in zip(answers, arrays, strict=True):
        assert_acts(answer, loaded.run(values))


def test_reply_names_the_version_that_acted(served: ServedPolicy, loaded: LoadedPolicy) -> None:
    """Policy, version, learner update and rows are in the message."""
    (answer,) = served.act([question(served, inputs(loaded, 2, 0))])

    assert isinstance(answer, Answer)
    message = answer.message
    assert (message.policy, message.policy_version, message.learner_update) == ("p", 7, 6)
    assert message.rows == 2


def test_request_above_a_forward_is_computed_in_parts(served: ServedPolicy, loaded: LoadedPolicy) -> None:
    """40 rows at 16 a forward give what one forward gives."""
    values = inputs(loaded, 40, 3)
    (answer,) = served.act([question(served, values)])

    assert_acts(answer, loaded.run(values))


def spoil(values: Arrays, name: str, value: float) -> Arrays:
    """The same inputs with one bad number in the last row."""
    bad = {key: array.copy() for key, array in values.items()}
    bad[name][-1] = value
    return bad


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("observation.position", np.nan, InvalidObservation, "observation.position: NaN in row 1"),
        ("observation.position", np.inf, InvalidObservation, "observation.position: infinity in row 1"),
        ("observation.mode", 9, InvalidObservation, "observation.mode"),
        ("action_mask.move", 0, InvalidActionMask, "mask of action.move allows nothing in row 1"),
        ("noise.force", np.nan, ContractError, "noise.force holds NaN"),
    ],
)
def test_bad_values_get_their_error_and_the_others_their_actions(
    served: ServedPolicy,
    loaded: LoadedPolicy,
    name: str,
    value: float,
    error: type[RelayRLError],
    message: str,
) -> None:
    """One bad request among four: it is told which leaf and row, the others are computed."""
    arrays = [inputs(loaded, 2, seed) for seed in range(4)]
    arrays[2] = spoil(arrays[2], name, value)
    answers = served.act([question(served, values) for values in arrays])

    for index in (0, 1, 3):
        assert_acts(answers[index], loaded.run(arrays[index]))
    assert isinstance(answers[2], error)
    assert message in str(answers[2])


def test_mask_of_bytes_other_than_0_and_1_is_refused(served: ServedPolicy, loaded: LoadedPolicy) -> None:
    """A byte of 2 is no bool, whatever numpy makes of it."""
    values = inputs(loaded, 1, 0)
    headers, frame = frames.pack_leaves(values)
    mask_at = [header.name for header in headers].index("action_mask.move")
    offset = sum(-(-values[header.name].nbytes // 8) * 8 for header in headers[:mask_at])
    bent = bytearray(frame)
    bent[offset] = 2
    request = RequestActions(policy="p", rows=1, leaves=headers)
    (answer,) = served.act([served.question(request, memoryview(bent))])

    assert isinstance(answer, InvalidActionMask)


def test_everything_bad_gives_every_request_its_own_error(served: ServedPolicy, loaded: LoadedPolicy) -> None:
    """No forward is left, nobody is forgotten."""
    values = inputs(loaded, 1, 0)
    bad = [spoil(values, "observation.position", np.nan), spoil(values, "action_mask.move", 0)]
    answers = served.act([question(served, one) for one in bad])

    assert [type(answer) for answer in answers] == [InvalidObservation, InvalidActionMask]


def test_observation_that_overflows_the_policy_fails_alone(
    served: ServedPolicy, loaded: LoadedPolicy
) -> None:
    """Noise so large that the log-prob is not finite: an InferenceError for it, actions for the others."""
    arrays = [inputs(loaded, 1, seed) for seed in range(3)]
    arrays[1]["noise.force"][:] = 3e38
    answers = served.act([question(served, values) for values in arrays])

    assert isinstance(answers[1], InferenceError)
    for index in (0, 2):
        assert_acts(answers[index], loaded.run(arrays[index]))


def test_frame_of_another_size_is_refused(served: ServedPolicy, loaded: LoadedPolicy) -> None:
    """Bytes and announced leaves must agree."""
    headers, frame = frames.pack_leaves(inputs(loaded, 2, 0))
    request = RequestActions(policy="p", rows=2, leaves=headers)

    for bent in (frame[:-1], frame + b"\0", b""):
        with pytest.raises(FrameError, match="the frame has"):
            served.question(request, memoryview(bent))


def test_rows_must_be_those_of_the_leaves_also_when_the_layout_is_known(
    served: ServedPolicy, loaded: LoadedPolicy
) -> None:
    """A header that says 3 rows above leaves of 2 is refused before and after the layout was learnt."""
    headers, frame = frames.pack_leaves(inputs(loaded, 2, 0))
    for rows in (3, 2, 3):
        request = RequestActions(policy="p", rows=rows, leaves=headers)
        if rows == 2:
            served.question(request, memoryview(frame))
        else:
            with pytest.raises(SpecMismatch):
                served.question(request, memoryview(frame))


def test_known_layouts_are_kept_over_a_swap_of_equal_inputs(
    served: ServedPolicy, loaded: LoadedPolicy
) -> None:
    """A new version of the same inputs answers requests of the old one's layouts alike."""
    asked = question(served, inputs(loaded, 2, 0))
    newer = ServedPolicy(loaded, max_batch_rows=16, previous=served)

    assert question(newer, inputs(loaded, 2, 0)).layout is asked.layout


def test_layouts_that_are_kept_are_bounded(served: ServedPolicy, loaded: LoadedPolicy) -> None:
    """A peer that invents layouts does not fill the memory."""
    for rows in range(1, 1100):
        layout = layout_of(loaded.inputs, rows)
        request = RequestActions(policy="p", rows=rows, leaves=layout.headers)
        served.question(request, memoryview(bytes(layout.frame_bytes)))

    assert len(served._layouts) <= 1024
