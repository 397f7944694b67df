"""The errors of RelayRL; every part raises these and every client catches these.

RelayRLError
├── ConfigError                 a setting is unknown, of a wrong type or out of range
├── ContractError               a value breaks a rule of the record, the wire or the API
│   ├── FrameError              bytes that do not parse as a message of ours
│   │   ├── ProtocolVersionError  a message of a protocol version that we do not speak
│   │   └── MessageTooLarge      a message above the limit of its receiver
│   ├── SchemaVersionError      a database or file of a newer schema than this code
│   ├── SpecMismatch            a shape, dtype, bound or leaf name that differs from the spec
│   ├── InvalidObservation      a value that no policy may see (NaN, out of dtype)
│   ├── InvalidActionMask       a mask that allows nothing, or of a wrong shape
│   ├── InvalidReward           a reward that is not finite or comes at the wrong moment
│   ├── EpisodeError            a call out of order in an episode
│   ├── RunMismatch             a run exists with other specs or hyperparameters
│   └── InvalidTrajectory       a finished trajectory that fails validation
├── UnknownActor                an actor id that this client does not have
├── UnknownRun                  no run of that name or id, and none may be created
├── RunFailed                   the run ended by a failure; nothing learns from it any more
├── TransportError              the other side could not be reached or did not answer
│   ├── PeerTimeout             no answer within the deadline
│   ├── PeerLost                the connection broke while a request was open
│   ├── Draining                the other side is about to stop and takes no new work
│   └── PeerRejected            the other side answered with an error; carries its code
├── StoreError                  the trajectory store refused or failed
│   ├── DuplicateTrajectory     the same id with another digest
│   ├── StoreUnavailable        the database cannot be reached now; try again
│   └── LeaseLost               another process holds the run's lease now
├── RegistryError               the model registry refused
│   ├── UnknownPolicy           no such policy
│   ├── UnknownPolicyVersion    no such version or alias
│   ├── DigestMismatch          bytes that do not hash to their digest
│   └── StaleFencingToken       a publication by a learner that lost its lease
├── ArtefactError               a policy artefact that cannot be loaded
│   └── GoldenMismatch          it loads, but does not reproduce its golden vectors
├── InferenceError              the policy could not compute an action
├── PacingTimeout               admission did not come within the deadline
├── StorageFull                 a disk is full; nothing was changed
├── SpoolError                  the spool cannot accept more or cannot be written
└── Overloaded                  refused for load; carries retry_after_seconds

Each class carries a stable `code` (its wire name). An error that crosses a process arrives as the same
class (`from_code`).
"""

from __future__ import annotations

from typing import ClassVar


class RelayRLError(Exception):
    """Base of every error that RelayRL raises on purpose."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class ConfigError(RelayRLError):
    """A setting is unknown, of a wrong type or out of range; the message names its path."""

    code = "config"


class ContractError(RelayRLError):
    """A value breaks a rule of the record, the wire or the API."""

    code = "contract"


class FrameError(ContractError):
    """Bytes that do not parse as a message of ours.

    `request_id` is the id of the message, 0 where it could not be read.
    """

    code = "frame"
    request_id: int = 0


class ProtocolVersionError(FrameError):
    """A message of a protocol version that we do not speak."""

    code = "protocol_version"


class MessageTooLarge(FrameError):
    """A message above the limit of its receiver; the same message will never be taken."""

    code = "message_too_large"


class SchemaVersionError(ContractError):
    """A database or file of a newer schema than this code."""

    code = "schema_version"


class SpecMismatch(ContractError):
    """A shape, dtype, bound or leaf name that differs from the spec."""

    code = "spec_mismatch"


class InvalidObservation(ContractError):
    """An observation that no policy may see, such as NaN where the run does not allow it."""

    code = "invalid_observation"


class InvalidActionMask(ContractError):
    """A mask that allows nothing, or of a wrong shape."""

    code = "invalid_action_mask"


class InvalidReward(ContractError):
    """A reward that is not finite or that comes at the wrong moment."""

    code = "invalid_reward"


class EpisodeError(ContractError):
    """A call out of order in an episode."""

    code = "episode"


class RunMismatch(ContractError):
    """A run exists with other specs or hyperparameters than the caller set."""

    code = "run_mismatch"


class InvalidTrajectory(ContractError):
    """A finished trajectory that fails validation; it goes to quarantine with `reason`, a fixed word."""

    code = "invalid_trajectory"

    def __init__(self, message: str, reason: str = "invalid") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownActor(RelayRLError):
    """An actor id that this client does not have."""

    code = "unknown_actor"


class UnknownRun(RelayRLError):
    """No run of that name or id exists, and none may be created."""

    code = "unknown_run"


class RunFailed(RelayRLError):
    """The run ended by a failure: its learner gave up, and nothing learns from it any more."""

    code = "run_failed"


class TransportError(RelayRLError):
    """The other side could not be reached or did not answer."""

    code = "transport"
    retryable = True


class PeerTimeout(TransportError):
    """No answer within the deadline."""

    code = "peer_timeout"


class PeerLost(TransportError):
    """The connection broke while a request was open."""

    code = "peer_lost"


class Draining(TransportError):
    """The other side is about to stop and takes no new work; another address may (contracts C6)."""

    code = "draining"


class PeerRejected(TransportError):
    """The other side answered with an error that has no class here."""

    code = "peer_rejected"
    retryable = False


class StoreError(RelayRLError):
    """The trajectory store refused or failed."""

    code = "store"


class DuplicateTrajectory(StoreError):
    """A known trajectory id, or a known segment of an episode, with other content."""

    code = "duplicate_trajectory"


class StoreUnavailable(StoreError):
    """The database cannot be reached now; the same call may succeed later."""

    code = "store_unavailable"
    retryable = True


class LeaseLost(StoreError):
    """Another process holds the run's lease now."""

    code = "lease_lost"


class RegistryError(RelayRLError):
    """The model registry refused."""

    code = "registry"


class UnknownPolicy(RegistryError):
    """No policy of that name has been published."""

    code = "unknown_policy"


class UnknownPolicyVersion(RegistryError):
    """The policy has no such version or alias."""

    code = "unknown_policy_version"


class DigestMismatch(RegistryError):
    """Bytes that do not hash to their digest, or one key with two digests."""

    code = "digest_mismatch"


class StaleFencingToken(RegistryError):
    """A publication by a learner that lost its lease to a newer one."""

    code = "stale_fencing_token"


class ArtefactError(RelayRLError):
    """A policy artefact that cannot be loaded."""

    code = "artefact"


class GoldenMismatch(ArtefactError):
    """An artefact that loads but does not reproduce its golden vectors."""

    code = "golden_mismatch"


class InferenceError(RelayRLError):
    """The policy could not compute an action."""

    code = "inference"


class PacingTimeout(RelayRLError):
    """Admission (contracts E, F) did not come within the deadline."""

    code = "pacing_timeout"
    retryable = True


class StorageFull(RelayRLError):
    """A disk is full: the call changed nothing and may succeed once there is space."""

    code = "storage_full"
    retryable = True


class SpoolError(RelayRLError):
    """The spool cannot accept more, cannot be written, or belongs to another process."""

    code = "spool"


class Overloaded(RelayRLError):
    """Refused for load; try again after `retry_after_seconds`."""

    code = "overloaded"
    retryable = True

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message, retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.args[0]} (try again after {self.retry_after_seconds:g} s)"


def _all_subclasses(cls: type[RelayRLError]) -> list[type[RelayRLError]]:
    direct = cls.__subclasses__()
    return direct + [sub for child in direct for sub in _all_subclasses(child)]


def from_code(code: str, message: str, retry_after_seconds: float | None = None) -> RelayRLError:
    """The error that a peer's error reply stands for; `PeerRejected` where the code is not known here."""
    if code == Overloaded.code:
        return Overloaded(message, retry_after_seconds or 1.0)
    known = {cls.code: cls for cls in _all_subclasses(RelayRLError)}
    return known[code](message) if code in known else PeerRejected(f"{code}: {message}")
