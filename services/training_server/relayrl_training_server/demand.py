"""What the learner asks of its clients (contracts E2): steps, as a cumulative demand that ingest grants.

Only runs that take whole episodes under block pacing ask; rollouts are admitted by their number. How many
steps an episode takes is not known beforehand: the demand begins with an estimate, and grows while nothing
comes.
"""

from __future__ import annotations

import time

from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_training_server.algorithms.configs import needs
from relayrl_training_server.sampler import Moment, Sampler

PATIENCE_SECONDS = 2.5  # longer than a heartbeat: grants travel in the replies to them
_LARGEST_FACTOR = 1024


class Demand:
    """The demand of one run. Does nothing for runs without leases."""

    def __init__(self, store: TrajectoryStore, run: Run) -> None:
        self._store = store
        self._run_id = run.run_id
        self._asks = run.pacing == "block" and needs(run.algorithm, run.hyperparameters).whole_episodes
        self._asked = (-1, 0)
        self._factor = 1
        self._grown_at = time.monotonic()

    def ask(self, sampler: Sampler, moment: Moment, *, arrived: bool) -> None:
        """Asks for what the next batch lacks; more, if nothing has arrived for a while."""
        if not self._asks:
            return
        if arrived:
            self._factor, self._grown_at = 1, moment.now
        elif moment.now - self._grown_at > PATIENCE_SECONDS:
            self._factor, self._grown_at = min(2 * self._factor, _LARGEST_FACTOR), moment.now
        steps = sampler.steps_read + self._factor * sampler.selection.wanted_steps(moment)
        if moment.learner_update != self._asked[0] or steps > self._asked[1]:
            self._asked = (moment.learner_update, max(steps, self._asked[1]))
            self._store.set_demand(self._run_id, *self._asked)
