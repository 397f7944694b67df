"""The serving loop: requests off the socket, batches through the policies, replies back; one thread.

`RouterServer.run` drives `InferenceServer.handle` with everything that came in while the last batches were
computed. Requests for a policy that is not loaded wait apart, and its loader thread answers them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, cast

from relayrl_inference_server.acting import Answer, Question, ServedPolicy
from relayrl_inference_server.batcher import Batch, Batcher, BatchLimits
from relayrl_inference_server.counters import ServingCounters, total
from relayrl_inference_server.policies import LATEST, PolicyPool, Selector
from relayrl_inference_server.settings import LimitSettings
from relayrl_shared import logs, telemetry
from relayrl_shared.errors import ContractError, Draining, Overloaded, PeerTimeout, RelayRLError
from relayrl_shared.messages import RequestActions
from relayrl_shared.sockets import Incoming, RouterServer

LOG = logs.get_logger(__name__)
TRACER = telemetry.tracer(__name__)


class Pending(NamedTuple):
    """A request that can be computed."""

    incoming: Incoming
    question: Question


class Parked(NamedTuple):
    """A request that waits for its policy."""

    incoming: Incoming
    deadline: float


class InferenceServer:
    """Answers what arrives at the inference server's address.

    Args:
        router: the bound socket; `handle` is its batch handler.
        batch_limits: bounds of the queue and of a forward.
        limits: bounds of a request.
    """

    def __init__(self, router: RouterServer, batch_limits: BatchLimits, limits: LimitSettings) -> None:
        self._router = router
        self._limits = limits
        self._batcher: Batcher[Pending] = Batcher(batch_limits)
        self._max_parked = batch_limits.max_queued_requests
        self._pool: PolicyPool | None = None
        self._lock = threading.Lock()
        self._loader_lock = threading.Lock()
        self._parked: dict[Selector, list[Parked]] = {}
        self._parked_count = 0
        self._counters = ServingCounters()
        self._loader_counters = ServingCounters()
        self.draining = False
        """Set from any thread: new requests are refused from now on."""

    def use(self, pool: PolicyPool) -> None:
        """Gives the server its policies; the pool's `on_loaded` must be `self.on_loaded`."""
        self._pool = pool

    # -- the serving thread

    def handle(self, batch: list[Incoming]) -> None:
        """Answers every message of the batch, or parks it for its policy's loader."""
        for incoming in batch:
            self._counters.requests_total += 1
            try:
                self._take(incoming)
            except Exception as error:  # noqa: BLE001  # one bad request must not hurt the others
                self._refuse(incoming, error, self._counters)
        while (work := self._batcher.take(time.monotonic())) is not None:
            self._serve(work)

    def _take(self, incoming: Incoming) -> None:
        message = incoming.message
        if not isinstance(message, RequestActions):
            kind = message.__struct_config__.tag
            raise ContractError(f"the inference server does not take {kind} messages")
        if self.draining or self._pool is None:
            raise Draining("this inference server is about to stop; ask another one")
        deadline = self._deadline(incoming, message)
        pinned = message.policy_version is not None
        selector = Selector(message.policy, message.policy_version, LATEST if pinned else message.alias)
        served = self._pool.find(selector)
        if served is None:
            self._park(selector, Parked(incoming, deadline))
        else:
            self._offer(served, incoming, message, deadline)

    def _deadline(self, incoming: Incoming, message: RequestActions) -> float:
        if not 1 <= message.rows <= self._limits.max_request_rows:
            raise ContractError(
                f"a request of {message.rows} rows; it takes 1 to {self._limits.max_request_rows} "
                "(limits.max_request_rows)"
            )
        timeout = message.timeout_seconds
        if not timeout >= 0:  # NaN too
            raise ContractError(f"timeout_seconds is {timeout}; it must be 0 or more")
        return incoming.received_at + min(timeout, self._limits.max_timeout_seconds)

    def _offer(
        self, served: ServedPolicy, incoming: Incoming, message: RequestActions, deadline: float
    ) -> None:
        question = served.question(message, incoming.payload[0])
        taken = self._batcher.offer(
            served,
            Pending(incoming, question),
            message.rows,
            deadline=deadline,
            now=incoming.received_at,
            priority=message.priority,
        )
        if not taken:
            self._counters.shed_total += 1
            queued = self._batcher.queued_requests
            raise Overloaded(f"{queued} requests are queued already", self._batcher.retry_after_seconds())

    def _serve(self, work: Batch[Pending]) -> None:
        served = cast("ServedPolicy", work.key)
        for pending in work.expired:
            self._expire(pending.incoming, self._counters)
        if not work.items:
            return
        began = time.monotonic()
        self._answer(served, work.items, work.rows, self._counters)
        elapsed = time.monotonic() - began
        self._counters.inference_seconds += elapsed
        self._batcher.served(work.rows, elapsed)

    # -- both threads

    def _answer(
        self, served: ServedPolicy, pendings: Sequence[Pending], rows: int, counters: ServingCounters
    ) -> None:
        counters.batches_total += 1
        counters.batch_rows.observe(rows)
        with ExitStack() as spans:
            _enter_spans(spans, pendings, rows)
            outcomes = served.act([pending.question for pending in pendings])
        now = time.monotonic()
        for pending, outcome in zip(pendings, outcomes, strict=True):
            if isinstance(outcome, Answer):
                self._router.reply(pending.incoming, outcome.message, (outcome.frame,))
                counters.answered_total += 1
                counters.rows_total += outcome.message.rows
                counters.latency.observe(now - pending.incoming.received_at)
            else:
                self._refuse(pending.incoming, outcome, counters)

    def _expire(self, incoming: Incoming, counters: ServingCounters) -> None:
        counters.expired_total += 1
        waited = time.monotonic() - incoming.received_at
        text = f"the deadline passed after {waited:.3f} s in the queue; nothing was computed"
        self._refuse(incoming, PeerTimeout(text), counters)

    def _refuse(self, incoming: Incoming, error: Exception, counters: ServingCounters) -> None:
        counters.errors[error.code if isinstance(error, RelayRLError) else RelayRLError.code] += 1
        if not isinstance(error, RelayRLError):
            LOG.error("request failed", exc_info=error)
        self._router.reply_error(incoming, error)

    # -- requests whose policy is not loaded

    def _park(self, selector: Selector, parked: Parked) -> None:
        with self._lock:
            if self._parked_count >= self._max_parked:
                raise Overloaded(f"{self._parked_count} requests wait for policies to be loaded", 1.0)
            self._parked_count += 1
            waiting = self._parked.setdefault(selector, [])
            waiting.append(parked)
            first = len(waiting) == 1
        if first and self._pool is not None:
            self._pool.load(selector)

    def on_loaded(self, selector: Selector, served: ServedPolicy | None, error: RelayRLError | None) -> None:
        """Answers, in a loader thread, the requests that waited for the policy."""
        with self._lock:
            waiting = self._parked.pop(selector, [])
            self._parked_count -= len(waiting)
        with self._loader_lock:  # two loaders share one set of counters
            for parked in waiting:
                self._answer_parked(parked, served, error)

    def _answer_parked(self, parked: Parked, served: ServedPolicy | None, error: RelayRLError | None) -> None:
        incoming, counters = parked.incoming, self._loader_counters
        message = incoming.message
        if served is None or not isinstance(message, RequestActions):
            self._refuse(incoming, error or RelayRLError("the policy could not be loaded"), counters)
        elif parked.deadline <= time.monotonic():
            self._expire(incoming, counters)
        else:
            try:
                pending = Pending(incoming, served.question(message, incoming.payload[0]))
                self._answer(served, [pending], message.rows, counters)
            except Exception as failure:  # noqa: BLE001  # each of them must be answered
                self._refuse(incoming, failure, counters)

    # -- any thread

    def refuse_parked(self) -> None:
        """Sends those away whose policy will not be loaded any more."""
        for selector in list(self._parked):
            self.on_loaded(selector, None, Draining("this inference server stops; ask another one"))

    def counters(self) -> ServingCounters:
        """The counters now."""
        return total((self._counters, self._loader_counters))

    @property
    def queued_requests(self) -> int:
        """Requests that wait, for a forward or for their policy."""
        return self._batcher.queued_requests + self._parked_count


def _enter_spans(spans: ExitStack, pendings: Sequence[Pending], rows: int) -> None:
    """One span a request that carries a trace: the batch that it shared."""
    for pending in pendings:
        traceparent = pending.incoming.message.traceparent
        if traceparent is not None:
            span = TRACER.span(
                "inference.act", parent=traceparent, batch_rows=rows, batch_requests=len(pendings)
            )
            spans.enter_context(span)
