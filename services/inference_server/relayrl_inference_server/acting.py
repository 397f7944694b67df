"""One loaded policy version as the server uses it: checks requests, computes batches, packs replies.

Driven by `server` for queued batches and by its loader for requests that waited for their policy; several
threads may act at once. One bad request in a batch gets its own error and never hurts the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relayrl_inference_server.layouts import Arrays, Layout, check_leaves, layout_of
from relayrl_shared.errors import ContractError, FrameError, InferenceError, InvalidActionMask, RelayRLError
from relayrl_shared.messages import Actions, RequestActions
from relayrl_shared.policy.engine import LoadedPolicy
from relayrl_shared.spaces import mask_leaf_name
from relayrl_shared.validation import check_action_mask, check_observation

MAX_KNOWN_LAYOUTS = 1024


@dataclass(frozen=True, slots=True)
class Question:
    """The input of one request: a packed frame and where its leaves lie."""

    layout: Layout
    frame: memoryview


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to one question and its payload."""

    message: Actions
    frame: memoryview


Outcomes = list[Answer | RelayRLError | None]


class ServedPolicy:
    """A loaded version and what is known of the requests to it.

    Args:
        loaded: the version.
        max_batch_rows: rows of one forward; more are computed in parts.
        previous: the version before; what was learnt of layouts is kept where the inputs are the same.
    """

    def __init__(
        self, loaded: LoadedPolicy, *, max_batch_rows: int, previous: ServedPolicy | None = None
    ) -> None:
        manifest = loaded.manifest
        self.loaded = loaded
        self.manifest = manifest
        self.policy_version = loaded.policy_version or 0
        self._max_batch_rows = max_batch_rows
        self._observations = [leaf.name for leaf in manifest.observation_spec.leaves]
        masks = {leaf: mask_leaf_name(leaf) for leaf in manifest.masked_leaves}
        self._masks = {leaf: name for leaf, name in masks.items() if name in loaded.input_names}
        self._noise = [leaf.name for leaf in manifest.noise]
        self._replies: dict[int, tuple[Layout, Actions]] = {}
        same_inputs = previous is not None and previous.loaded.inputs == loaded.inputs
        self._layouts: dict[Any, Layout] = previous._layouts if previous and same_inputs else {}

    # -- requests

    def question(self, request: RequestActions, frame: memoryview) -> Question:
        """The input of a request, checked as far as it can be without its values.

        Raises:
            SpecMismatch: a leaf is missing, unknown, or of another shape or dtype.
            FrameError: the frame's size is not the leaves'.
        """
        layout = self._layouts.get(request.leaves)
        if layout is None or layout.rows != request.rows:
            layout = self._learn(request)
        if len(frame) != layout.frame_bytes:
            raise FrameError(f"the leaves take {layout.frame_bytes} bytes, the frame has {len(frame)}")
        return Question(layout, frame)

    def _learn(self, request: RequestActions) -> Layout:
        layout = check_leaves(self.loaded.inputs, request.leaves, request.rows)
        if len(self._layouts) >= MAX_KNOWN_LAYOUTS:
            self._layouts.clear()
        self._layouts[request.leaves] = layout
        return layout

    # -- batches

    def act(self, questions: Sequence[Question]) -> list[Answer | RelayRLError]:
        """The answer to each question, or what is wrong with it."""
        outcomes: Outcomes = [None] * len(questions)
        groups = _by_layout(questions, range(len(questions)))
        inputs = _gather(questions, groups)
        try:
            self._check(inputs)
        except ContractError as error:
            self._find_bad(questions, outcomes, error)
            groups = _by_layout(questions, [i for i, outcome in enumerate(outcomes) if outcome is None])
            inputs = _gather(questions, groups)
        if groups:
            try:
                self._answer(questions, groups, inputs, outcomes)
            except InferenceError as error:
                self._answer_apart(questions, groups, outcomes, error)
        return [outcome for outcome in outcomes if outcome is not None]

    def _find_bad(self, questions: Sequence[Question], outcomes: Outcomes, error: ContractError) -> None:
        """Gives the questions whose values the policy may not see their own error."""
        if len(questions) == 1:
            outcomes[0] = error
            return
        for index, question in enumerate(questions):
            try:
                self._check(question.layout.gather([question.frame]))
            except ContractError as own:
                outcomes[index] = own

    def _check(self, inputs: Arrays) -> None:
        rows = len(inputs[self._observations[0]])
        observation = {name: inputs[name] for name in self._observations}
        check_observation(self.manifest.observation_spec, observation, rows, self.manifest.allow_nan)
        if self._masks:
            self._check_masks(inputs, rows)
        for name in self._noise:
            if not np.isfinite(inputs[name]).all():
                raise ContractError(f"{name} holds NaN or infinity: send noise of its kind, or zeros")

    def _check_masks(self, inputs: Arrays, rows: int) -> None:
        masks = {leaf: inputs[name] for leaf, name in self._masks.items()}
        for leaf, mask in masks.items():
            if mask.size and mask.view(np.uint8).max() > 1:
                raise InvalidActionMask(f"the mask of {leaf} holds bytes other than 0 and 1")
        check_action_mask(self.manifest.action_spec, self.manifest.masked_leaves, masks, rows)

    def _answer(
        self, questions: Sequence[Question], groups: list[list[int]], inputs: Arrays, outcomes: Outcomes
    ) -> None:
        outputs = self._run(inputs)
        start = 0
        for indices in groups:
            rows = questions[indices[0]].layout.rows
            layout, message = self._reply(rows)
            end = start + rows * len(indices)
            part = outputs if len(groups) == 1 else {name: a[start:end] for name, a in outputs.items()}
            for index, frame in zip(indices, layout.scatter(part, len(indices)), strict=True):
                outcomes[index] = Answer(message, frame)
            start = end

    def _answer_apart(
        self,
        questions: Sequence[Question],
        groups: list[list[int]],
        outcomes: Outcomes,
        error: InferenceError,
    ) -> None:
        indices = [index for group in groups for index in group]
        if len(indices) == 1:
            outcomes[indices[0]] = error
            return
        for index in indices:
            question = questions[index]
            try:
                self._answer(questions, [[index]], question.layout.gather([question.frame]), outcomes)
            except InferenceError as own:
                outcomes[index] = own

    def _run(self, inputs: Arrays) -> Arrays:
        rows = len(inputs[self._observations[0]])
        limit = self._max_batch_rows
        if rows <= limit:
            return self.loaded.run(inputs)
        parts = [
            self.loaded.run({name: array[start : start + limit] for name, array in inputs.items()})
            for start in range(0, rows, limit)
        ]
        return _concatenate(parts)

    def _reply(self, rows: int) -> tuple[Layout, Actions]:
        known = self._replies.get(rows)
        if known is None:
            if len(self._replies) >= MAX_KNOWN_LAYOUTS:
                self._replies.clear()
            layout = layout_of(self.loaded.outputs, rows)
            message = Actions(
                policy=self.manifest.policy,
                policy_version=self.policy_version,
                learner_update=self.manifest.learner_update,
                rows=rows,
                leaves=layout.headers,
            )
            known = self._replies[rows] = (layout, message)
        return known


def _by_layout(questions: Sequence[Question], indices: Sequence[int]) -> list[list[int]]:
    """The indices in groups of one layout."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(id(questions[index].layout), []).append(index)
    return list(groups.values())


def _gather(questions: Sequence[Question], groups: Sequence[Sequence[int]]) -> Arrays:
    if not groups:
        return {}
    parts = [
        questions[indices[0]].layout.gather([questions[index].frame for index in indices])
        for indices in groups
    ]
    return parts[0] if len(parts) == 1 else _concatenate(parts)


def _concatenate(parts: Sequence[Arrays]) -> Arrays:
    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([part[name] for part in parts])

    return {name: joined(name) for name in parts[0]}
