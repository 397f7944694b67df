"""The client's standing with the training server: hello, heartbeats, actor changes, goodbye.

Driven by the agent. One thread sends a heartbeat every few seconds, or at once when woken: for steps that a
paced call waits for, or actors that came and went. A server that no longer knows the client (it restarted) is
told hello again; while it cannot be reached the session says so and tries on. What no trying changes, a run
that is gone, differs or has failed, is `failure`, which the runtime raises in the application.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relayrl_shared.errors import (
    ConfigError,
    PeerTimeout,
    RelayRLError,
    RunFailed,
    RunMismatch,
    SpecMismatch,
    UnknownRun,
)
from relayrl_shared.messages import (
    ActorChange,
    ActorInfo,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Ok,
    RunRequest,
    SpoolReport,
    Welcome,
)
from relayrl_shared.sockets import Peer

_RETRY_SECONDS = 0.5
_REQUEST_SECONDS = 5.0
_TERMINAL = (UnknownRun, RunMismatch, SpecMismatch, ConfigError, RunFailed)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionLinks:
    """What the session asks of the rest of the client at each message.

    actors: those that the learner waits for. spools: the reports of every spool of this run. policy_versions:
    in use, by policy. lease: steps wanted, and steps used since it was last asked. on_lease: takes a grant
    (steps, seconds until all that is held expires); 0 steps renew.
    """

    actors: Callable[[], Sequence[ActorInfo]]
    spools: Callable[[], Sequence[SpoolReport]]
    policy_versions: Callable[[], dict[str, int]]
    lease: Callable[[], tuple[int, int]] = lambda: (0, 0)
    on_lease: Callable[[int, float], None] = lambda steps, seconds: None


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """Counters of a session. `state` is what the server said of the run; `last_error` of the last failure."""

    heartbeats_total: int
    failures_total: int
    hellos_total: int
    learner_update: int
    is_up: bool
    state: str
    last_error: str


class _Change:
    """An actor change on its way to the server. error: why the server will never take it."""

    __slots__ = ("done", "error", "message")

    def __init__(self, message: ActorChange) -> None:
        self.message = message
        self.done = threading.Event()
        self.error: RelayRLError | None = None


class Session:
    """A client's membership in a run.

    Args:
        address: of the agent listener, `tcp://host:port`.
        client_id: of this client.
        run: the run to join.
    """

    def __init__(self, address: str, client_id: str, run: RunRequest) -> None:
        self._client_id = client_id
        self._run = run
        self._peer = Peer(address)
        self._welcome: Welcome | None = None
        self._links: SessionLinks | None = None
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._changes: list[_Change] = []
        self._is_up = True
        self._failure: RelayRLError | None = None
        self._learner_update = 0
        self._state = ""
        self._last_error = ""
        self._heartbeats_total = self._failures_total = self._hellos_total = 0

    # -- joining ---------------------------------------------------------------------------------------

    def join(self, actors: Sequence[ActorInfo], timeout_seconds: float) -> Welcome:
        """Say hello until the server answers.

        Raises:
            PeerTimeout: it did not answer in time.
            RunMismatch, SpecMismatch, ConfigError: the run is not as this client says.
            RelayRLError: another refusal that no later try changes.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise PeerTimeout(
                    f"the training server's agent listener at {self._peer.address} did not answer within "
                    f"{timeout_seconds:g} s: is it running, and is agent_listener_address right?"
                )
            try:
                return self._hello(actors, (), remaining)
            except RelayRLError as exc:
                if not exc.retryable or self._stopping.wait(min(_RETRY_SECONDS, max(remaining, 0))):
                    raise

    def _hello(
        self, actors: Sequence[ActorInfo], spools: Sequence[SpoolReport], timeout_seconds: float
    ) -> Welcome:
        hello = Hello(client_id=self._client_id, run=self._run, actors=tuple(actors), spools=tuple(spools))
        reply, _ = self._peer.request(hello, timeout_seconds=timeout_seconds)
        if not isinstance(reply, Welcome):
            raise RunMismatch(f"the agent listener answered {type(reply).__name__} to hello")
        if self._welcome is not None and reply.run_id != self._welcome.run_id:
            raise RunMismatch(
                f"run {reply.run_name} is {reply.run_id} now and was {self._welcome.run_id}: "
                "start the client again"
            )
        self._hellos_total += 1
        self._welcome = self._welcome or reply
        self._learner_update = max(self._learner_update, reply.learner_update)
        return reply

    def start(self, links: SessionLinks) -> None:
        """Begin to send heartbeats."""
        self._links = links
        self._thread = threading.Thread(target=self._beat, name="relayrl-session", daemon=True)
        self._thread.start()

    # -- any thread ------------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether the last message was answered."""
        return self._is_up

    @property
    def failure(self) -> RelayRLError | None:
        """Why this client cannot train any more, as the server said last: trying on is of no use."""
        return self._failure

    @property
    def learner_update(self) -> int:
        """The highest number of finished updates that the server told."""
        return self._learner_update

    def wake(self) -> None:
        """Send a heartbeat now."""
        self._wake.set()

    def change_actors(
        self, added: Sequence[ActorInfo] = (), removed: Sequence[str] = (), *, timeout_seconds: float = 5.0
    ) -> bool:
        """Tell the server of actors that came or went; whether it knows by the end of the time.

        It is told later where it cannot be reached now: the change stays queued.

        Raises:
            RelayRLError: the server will never take this change.
        """
        welcome = self._welcome
        if welcome is None or self._thread is None:
            return False
        change = ActorChange(
            client_id=self._client_id, run_id=welcome.run_id, added=tuple(added), removed=tuple(removed)
        )
        waiting = _Change(change)
        with self._lock:
            self._changes.append(waiting)
        self._wake.set()
        told = waiting.done.wait(timeout_seconds)
        if waiting.error is not None:
            raise waiting.error
        return told

    def statistics(self) -> SessionStatistics:
        """Where the session stands."""
        return SessionStatistics(
            heartbeats_total=self._heartbeats_total,
            failures_total=self._failures_total,
            hellos_total=self._hellos_total,
            learner_update=self._learner_update,
            is_up=self._is_up,
            state=self._state,
            last_error=self._last_error,
        )

    def leave(self, spools: Sequence[SpoolReport], timeout_seconds: float) -> bool:
        """Say goodbye and stop; whether the server heard it."""
        self.stop()
        welcome = self._welcome
        if welcome is None or timeout_seconds <= 0:
            return False
        goodbye = Goodbye(client_id=self._client_id, run_id=welcome.run_id, spools=tuple(spools))
        try:
            self._peer.request(goodbye, timeout_seconds=timeout_seconds)
        except RelayRLError as exc:
            _log.warning("goodbye was not heard: %s", exc)
            return False
        return True

    def stop(self) -> None:
        """End the thread; the connection stays for a goodbye."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Stop, and close the connection."""
        self.stop()
        self._peer.close()

    # -- the session's thread --------------------------------------------------------------------------

    def _beat(self) -> None:
        welcome, links = self._welcome, self._links
        if welcome is None or links is None:
            return
        while not self._stopping.is_set():
            try:
                self._exchange(welcome, links)
                self._is_up = True
                self._failure = self._failed_run(welcome)
                pause = welcome.limits.heartbeat_seconds
            except RelayRLError as exc:
                self._failed(exc)
                pause = min(_RETRY_SECONDS, welcome.limits.heartbeat_seconds)
            self._wake.wait(pause)
            self._wake.clear()

    def _failed_run(self, welcome: Welcome) -> RelayRLError | None:
        """A run under `block` cannot go on without its learner; under `free` acting and storing may."""
        if self._state != "failed" or welcome.pacing != "block":
            return None
        return RunFailed(
            f"run {welcome.run_name} has failed: its learner gave up. "
            "`relayrl status` and the log of the training server say why"
        )

    def _failed(self, error: RelayRLError) -> None:
        if isinstance(error, _TERMINAL):
            self._failure = error
        if self._is_up:
            _log.warning("the training server cannot be reached or refuses: %s", error)
        self._is_up = False
        self._failures_total += 1
        self._last_error = str(error)

    def _exchange(self, welcome: Welcome, links: SessionLinks) -> None:
        self._send_changes()
        wanted, used = links.lease()
        heartbeat = Heartbeat(
            client_id=self._client_id,
            run_id=welcome.run_id,
            spools=tuple(links.spools()),
            policy_versions=links.policy_versions(),
            lease_steps_wanted=wanted,
            lease_steps_used=used,
        )
        reply, _ = self._peer.request(heartbeat, timeout_seconds=_REQUEST_SECONDS)
        self._heartbeats_total += 1
        if not isinstance(reply, HeartbeatReply):
            raise RunMismatch(f"the agent listener answered {type(reply).__name__} to a heartbeat")
        self._learner_update = max(self._learner_update, reply.learner_update)
        self._state = reply.run_state
        if not reply.known:
            _log.info("the training server does not know this client any more; saying hello again")
            self._hello(links.actors(), links.spools(), _REQUEST_SECONDS)
        if reply.lease_steps or reply.lease_expires_in_seconds > 0:  # a grant of 0 renews what is held
            links.on_lease(reply.lease_steps, reply.lease_expires_in_seconds)

    def _send_changes(self) -> None:
        while True:
            with self._lock:
                if not self._changes:
                    return
                change = self._changes[0]
            try:
                reply, _ = self._peer.request(change.message, timeout_seconds=_REQUEST_SECONDS)
                if not isinstance(reply, Ok):
                    raise RunMismatch(
                        f"the agent listener answered {type(reply).__name__} to an actor change"
                    )
            except RelayRLError as exc:
                if exc.retryable:
                    raise
                change.error = exc  # the same change would be refused for ever, and hold up all heartbeats
                _log.error("the training server refuses a change of actors: %s", exc)
            with self._lock:
                self._changes.pop(0)
            change.done.set()
