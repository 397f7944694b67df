"""Publishes updates in the order of contracts G1; the learner hands it each update after its checkpoint.

Checkpoint first (the learner's), then the registry, then the use rows. What cannot go out now waits in a
queue that the next checkpoint holds; the same update twice is one version and one set of rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from relayrl_shared import logs
from relayrl_shared.errors import (
    ArtefactError,
    DigestMismatch,
    LeaseLost,
    RelayRLError,
    StaleFencingToken,
)
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.store.interface import TrajectoryStore, Use
from relayrl_training_server.checkpoints import Publication
from relayrl_training_server.export import build_artefact
from relayrl_training_server.policy_module import PolicyModule

_REPEATED = 2  # a resume repeats so many of the last publications (contracts G1)

_FINAL = (LeaseLost, StaleFencingToken, DigestMismatch, ArtefactError)
"""What no later try would change. Anything else may pass: a disk, a restart, a limit that is raised."""

LOG = logs.get_logger(__name__)


class Registry(Protocol):
    """What a publisher needs of a registry client."""

    def publish(self, artefact: PolicyArtefact, *, fencing_token: int) -> int:
        """Makes the artefact a version; the same again is the same version."""


@dataclass(frozen=True)
class Lineage:
    """The line of checkpoints that an update belongs to."""

    run_id: str
    policy: str
    algorithm: str
    hyperparameters: Mapping[str, Any]
    lineage_id: str
    parent_lineage_id: str | None


class Publisher:
    """A queue of publications, in order of their updates.

    Args:
        registry: where versions go.
        store: where use rows go.
        graph: of the policy's architecture.
        fencing_token: of the run's lease.
    """

    def __init__(self, registry: Registry, store: TrajectoryStore, graph: bytes, fencing_token: int) -> None:
        self._registry = registry
        self._store = store
        self._graph = graph
        self._fencing_token = fencing_token
        self._loaded: LoadedPolicy | None = None
        self.publications: tuple[Publication, ...] = ()
        self.policy_version: int | None = None
        self.trouble = ""

    @property
    def pending(self) -> int:
        """Publications that registry or store do not have yet."""
        return sum(not publication.settled for publication in self.publications)

    def prepare(
        self,
        module: PolicyModule,
        lineage: Lineage,
        learner_update: int,
        uses: tuple[Use, ...] = (),
        store_cursor: int = 0,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Makes an update's publication and queues it, once its artefact has proved itself (contracts G3).

        Raises:
            ArtefactError: ONNX Runtime does not reproduce what the module does.
        """
        artefact = build_artefact(
            module,
            self._graph,
            policy=lineage.policy,
            run_id=lineage.run_id,
            lineage_id=lineage.lineage_id,
            learner_update=learner_update,
            algorithm=lineage.algorithm,
            hyperparameters=lineage.hyperparameters,
            parent_version=self.policy_version,
            store_cursor=store_cursor,
            metrics=metrics,
            created_at=time.time(),
        )
        self._loaded = load_policy(artefact, previous=self._loaded)
        publication = Publication(
            manifest=artefact.manifest,
            weights=artefact.weights,
            golden=artefact.golden,
            uses=uses,
            parent_lineage_id=lineage.parent_lineage_id,
        )
        settled = [p for p in self.publications if p.settled][-(_REPEATED - 1) :]
        waiting = [p for p in self.publications if not p.settled]
        self.publications = (*settled, *waiting, publication)

    def resume(self, publications: tuple[Publication, ...]) -> None:
        """Queues what a checkpoint held, all of it: what had gone out goes out again, to no effect."""
        self.publications = tuple(
            msgspec.structs.replace(publication, policy_version=None, recorded=False)
            for publication in publications
        )

    def uses_of(self, learner_update: int) -> tuple[Use, ...]:
        """What an update that is still held decided upon: whoever publishes it again records it again."""
        held = [p.uses for p in self.publications if p.learner_update == learner_update]
        return held[-1] if held else ()

    def flush(self) -> bool:
        """Sends what waits, in order; False if something must wait on, and then `trouble` says why.

        Raises:
            LeaseLost, StaleFencingToken: the run is another's now.
            DigestMismatch: the registry has another artefact under the same key.
            ArtefactError: the artefact is not fit to be published.
        """
        for index, publication in enumerate(self.publications):
            try:
                settled = self._settle(publication)
            except _FINAL:
                raise
            except RelayRLError as error:
                if not self.trouble:
                    LOG.warning(
                        "publication waits", learner_update=publication.learner_update, reason=str(error)
                    )
                self.trouble = str(error)
                return False
            self.publications = (*self.publications[:index], settled, *self.publications[index + 1 :])
        self.trouble = ""
        return True

    def _settle(self, publication: Publication) -> Publication:
        """Brings one publication to the registry, then to the store."""
        if publication.settled:
            return publication
        if publication.policy_version is None:
            publication = msgspec.structs.replace(publication, policy_version=self._publish(publication))
            self._keep(publication)
        self.policy_version = publication.policy_version
        manifest = publication.manifest
        self._store.record_update(
            manifest.run_id,
            manifest.lineage_id,
            publication.parent_lineage_id,
            manifest.policy,
            manifest.learner_update,
            publication.policy_version,
            publication.uses,
            self._fencing_token,
        )
        return msgspec.structs.replace(publication, recorded=True)

    def _publish(self, publication: Publication) -> int:
        artefact = PolicyArtefact(publication.manifest, self._graph, publication.weights, publication.golden)
        return self._registry.publish(artefact, fencing_token=self._fencing_token)

    def _keep(self, publication: Publication) -> None:
        """Replaces the queued publication of the same update, so that its version is not asked for twice."""
        key = (publication.manifest.lineage_id, publication.learner_update)
        self.publications = tuple(
            publication if (p.manifest.lineage_id, p.learner_update) == key else p for p in self.publications
        )
