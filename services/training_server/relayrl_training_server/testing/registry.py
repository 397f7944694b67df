"""A registry in memory that checks its caller; tests of the learner publish to it."""

from __future__ import annotations

from relayrl_shared.errors import DigestMismatch, PeerTimeout, RelayRLError, StaleFencingToken
from relayrl_shared.policy.artefact import check_digests
from relayrl_shared.policy.manifest import PolicyArtefact

Key = tuple[str, str, str, int]


class MemoryRegistry:
    """Keeps what is published, under the rules of contracts G1 and G2.

    Attributes: artefacts, by version from 1; attempts, how often it was asked; down, True to answer nothing;
    trouble, an error to answer with.
    """

    def __init__(self) -> None:
        self.artefacts: list[PolicyArtefact] = []
        self.attempts = 0
        self.down = False
        self.trouble: RelayRLError | None = None
        self._versions: dict[Key, int] = {}
        self._newest_token = 0

    @property
    def latest(self) -> PolicyArtefact:
        """What was published last."""
        return self.artefacts[-1]

    def publish(self, artefact: PolicyArtefact, *, fencing_token: int) -> int:
        """The version of the artefact; the same key again is the same version.

        Raises:
            PeerTimeout: it is down.
            StaleFencingToken: a newer token published before.
            DigestMismatch: the key has other digests, or the bytes do not hash to theirs.
        """
        self.attempts += 1
        if self.down:
            raise PeerTimeout("the registry is down")
        if self.trouble is not None:
            raise self.trouble
        if fencing_token < self._newest_token:
            raise StaleFencingToken(f"token {fencing_token} is older than {self._newest_token}")
        self._newest_token = fencing_token
        check_digests(artefact)
        m = artefact.manifest
        key = (m.run_id, m.lineage_id, m.policy, m.learner_update)
        if key in self._versions:
            known = self.artefacts[self._versions[key] - 1].manifest
            if known.weights_digest != m.weights_digest:
                raise DigestMismatch(f"{key} was published with other weights")
            return self._versions[key]
        self.artefacts.append(artefact)
        self._versions[key] = len(self.artefacts)
        return self._versions[key]
