"""Tells subscribers that an alias moved, after the commit; driven by the catalog's `on_move`.

An announcement is a hint: one that is lost costs its subscriber a poll interval, so nothing here may fail a
publication.
"""

from __future__ import annotations

from relayrl_model_registry.store.interface import AliasMove
from relayrl_shared import logs, sockets
from relayrl_shared.messages import Announcement

LOG = logs.get_logger(__name__)


class AliasAnnouncer:
    """Turns alias moves into announcements.

    Args:
        announcer: the socket that spreads them.
    """

    def __init__(self, announcer: sockets.Announcer) -> None:
        self._announcer = announcer
        self.announced_total = 0
        self.failed_total = 0

    def announce(self, move: AliasMove, learner_update: int) -> None:
        """Announces a committed move; never raises."""
        message = Announcement(
            policy=move.policy,
            policy_version=move.to_version,
            alias=move.alias,
            learner_update=learner_update,
        )
        try:
            self._announcer.announce(message)
            self.announced_total += 1
        except Exception as error:  # noqa: BLE001  # the version is published; who missed the hint will poll
            self.failed_total += 1
            LOG.warning(
                "announcement failed",
                policy=move.policy,
                policy_version=move.to_version,
                error=str(error),
            )
