"""Leases, updates, uses, demand and grants; each test runs on each store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from relayrl_shared.errors import LeaseLost, StoreError
from relayrl_shared.store.interface import TrajectoryStore, Use, UseOutcome
from relayrl_shared.testing.store import RUN_ID, OpenStore, make_trajectory

pytestmark = pytest.mark.postgres


def use(position: int, outcome: UseOutcome = "used") -> Use:
    """What an update did with the trajectory at that position."""
    return Use(trajectory_id=f"spool-1-trajectory-{position:08d}", position=position, outcome=outcome)


def record(
    store: TrajectoryStore,
    learner_update: int,
    *uses: Use,
    lineage: str = "a",
    parent: str | None = None,
    policy: str = "cartpole",
    version: int | None = None,
    token: int = 1,
) -> None:
    """Records one update."""
    store.record_update(RUN_ID, lineage, parent, policy, learner_update, version, uses, token)


class TestLease:
    """One learner a run; its token only grows (contracts G2)."""

    def test_a_live_lease_keeps_others_out(self, store: TrajectoryStore) -> None:
        """While a holder's lease lives another gets LeaseLost that names the holder; other runs are free."""
        store.acquire_lease(RUN_ID, "first", 60.0)
        with pytest.raises(LeaseLost, match="first"):
            store.acquire_lease(RUN_ID, "second", 60.0)
        assert store.acquire_lease("run-2", "second", 60.0) == 1

    def test_the_token_grows_over_expiry_release_and_reopening(self, open_stores: OpenStore) -> None:
        """No token is ever given twice."""
        store = open_stores(writer_of="learner")
        tokens = [store.acquire_lease(RUN_ID, "first", -1.0)]
        tokens.append(store.acquire_lease(RUN_ID, "second", 60.0))
        store.release_lease(RUN_ID, tokens[-1])
        tokens.append(store.acquire_lease(RUN_ID, "third", -1.0))
        store.close()
        tokens.append(open_stores(writer_of="learner").acquire_lease(RUN_ID, "fourth", 60.0))
        assert tokens == [1, 2, 3, 4]

    def test_the_same_holder_gets_a_new_token(self, store: TrajectoryStore) -> None:
        """A holder that asks again gets a greater token, and its old one is lost."""
        old = store.acquire_lease(RUN_ID, "me", 60.0)
        new = store.acquire_lease(RUN_ID, "me", 60.0)
        assert new > old
        with pytest.raises(LeaseLost):
            store.renew_lease(RUN_ID, old, 60.0)

    def test_a_renewed_lease_lives_on(self, store: TrajectoryStore) -> None:
        """Renewing moves the end, also of an expired lease that nobody took."""
        token = store.acquire_lease(RUN_ID, "me", -1.0)
        store.renew_lease(RUN_ID, token, 60.0)
        with pytest.raises(LeaseLost):
            store.acquire_lease(RUN_ID, "another", 60.0)

    def test_who_lost_the_lease_cannot_renew_or_release(self, store: TrajectoryStore) -> None:
        """After a takeover, and after a release, the old token is worth nothing."""
        old = store.acquire_lease(RUN_ID, "old", -1.0)
        new = store.acquire_lease(RUN_ID, "new", 60.0)
        with pytest.raises(LeaseLost):
            store.renew_lease(RUN_ID, old, 60.0)
        with pytest.raises(LeaseLost):
            store.release_lease(RUN_ID, old)
        store.release_lease(RUN_ID, new)
        with pytest.raises(LeaseLost):
            store.renew_lease(RUN_ID, new, 60.0)

    def test_one_of_eight_gets_it(self, store: TrajectoryStore) -> None:
        """Of holders that ask at once exactly one gets the lease."""

        def acquire(number: int) -> int | None:
            try:
                return store.acquire_lease(RUN_ID, f"holder-{number}", 60.0)
            except LeaseLost:
                return None

        with ThreadPoolExecutor(8) as pool:
            tokens = [token for token in pool.map(acquire, range(8)) if token is not None]
        assert tokens == [1]


class TestUpdates:
    """An update and its uses are recorded once (contracts G1)."""

    def test_learner_update_follows(self, store: TrajectoryStore) -> None:
        """The finished updates are 0 at first and then the last recorded one."""
        assert store.learner_update(RUN_ID) == 0
        record(store, 1)
        record(store, 2)
        assert store.learner_update(RUN_ID) == 2

    def test_recording_again_changes_nothing(self, store: TrajectoryStore) -> None:
        """The same key with the same uses is done already, in any order of the uses."""
        store.commit([make_trajectory(1), make_trajectory(2)])
        record(store, 1, use(1), use(2))
        record(store, 1, use(2), use(1), version=5)
        audit = store.audit(RUN_ID)
        assert (audit.used, audit.used_twice, audit.unread) == (2, 0, 0)

    def test_the_same_key_with_other_uses_is_an_error(self, store: TrajectoryStore) -> None:
        """One update has one set of uses; the first stays."""
        store.commit([make_trajectory(1), make_trajectory(2)])
        record(store, 1, use(1))
        with pytest.raises(StoreError, match="other uses"):
            record(store, 1, use(2))
        assert store.audit(RUN_ID).used == 1

    def test_a_trajectory_named_twice_in_one_update(self, store: TrajectoryStore) -> None:
        """An update that names a trajectory with two outcomes is refused and not recorded."""
        with pytest.raises(StoreError, match="twice"):
            record(store, 1, use(1), use(1, "stale"))
        assert store.learner_update(RUN_ID) == 0

    def test_policies_have_their_own_updates(self, store: TrajectoryStore) -> None:
        """The same number of another policy is another update."""
        store.commit([make_trajectory(1), make_trajectory(2)])
        record(store, 1, use(1), policy="run/left")
        record(store, 1, use(2), policy="run/right")
        assert store.audit(RUN_ID).used == 2

    def test_an_older_token_is_refused(self, store: TrajectoryStore) -> None:
        """A learner that lost its lease records nothing; the one that has it does."""
        old = store.acquire_lease(RUN_ID, "old", -1.0)
        new = store.acquire_lease(RUN_ID, "new", 60.0)
        with pytest.raises(LeaseLost):
            record(store, 1, token=old)
        assert store.learner_update(RUN_ID) == 0
        record(store, 1, token=new)
        assert store.learner_update(RUN_ID) == 1

    def test_a_reader_sees_the_updates(self, store: TrajectoryStore, open_stores: OpenStore) -> None:
        """Who only reads sees what the learner recorded, also where it looked before."""
        reader = open_stores()
        assert (reader.learner_update(RUN_ID), reader.demand(RUN_ID)) == (0, None)
        record(store, 1)
        store.set_demand(RUN_ID, 1, 2048)
        assert (reader.learner_update(RUN_ID), reader.demand(RUN_ID)) == (1, (1, 2048))

    def test_many_uses(self, store: TrajectoryStore) -> None:
        """An update may decide on thousands of trajectories."""
        record(store, 1, *(use(i) for i in range(1, 5001)))
        assert store.audit(RUN_ID).used == 5000


class TestLineage:
    """Uses count along the surviving lineage only."""

    def store_six(self, store: TrajectoryStore) -> None:
        """Six trajectories to decide upon."""
        store.commit([make_trajectory(i) for i in range(1, 7)])

    def test_outcomes_are_counted(self, store: TrajectoryStore) -> None:
        """Used, unused by outcome, and unread trajectories add up to the stored ones."""
        self.store_six(store)
        record(store, 1, use(1), use(2, "stale"))
        record(store, 2, use(3), use(4, "overlap"), use(5, "stale"))
        audit = store.audit(RUN_ID)
        assert (audit.used, audit.unused, audit.unread) == (2, {"overlap": 1, "stale": 2}, 1)

    def test_used_twice_along_one_lineage_is_seen(self, store: TrajectoryStore) -> None:
        """A trajectory that two surviving updates used counts once as used and once as used twice."""
        self.store_six(store)
        record(store, 1, use(1))
        record(store, 2, use(1), use(2))
        audit = store.audit(RUN_ID)
        assert (audit.used, audit.used_twice, audit.unread) == (2, 1, 4)

    def test_passed_over_and_later_used_counts_as_used(self, store: TrajectoryStore) -> None:
        """Marked incomplete first and used later: used, once."""
        self.store_six(store)
        record(store, 1, use(1, "incomplete"))
        record(store, 2, use(1))
        audit = store.audit(RUN_ID)
        assert (audit.used, audit.used_twice, audit.unused) == (1, 0, {})

    def test_a_child_cuts_its_parent(self, store: TrajectoryStore) -> None:
        """After a resume from an older checkpoint the parent's later updates no longer count."""
        self.store_six(store)
        for number in (1, 2, 3):
            record(store, number, use(number))
        record(store, 2, use(2), use(3), lineage="b", parent="a")
        audit = store.audit(RUN_ID)
        assert (audit.used, audit.used_twice, audit.unread) == (3, 0, 3)
        assert store.learner_update(RUN_ID) == 2

    def test_a_chain_of_resumes(self, store: TrajectoryStore) -> None:
        """Each ancestor survives up to where its descendants began, a deeper cut included."""
        self.store_six(store)
        for number in (1, 2, 3, 4):
            record(store, number, use(number))
        record(store, 4, use(4), lineage="b", parent="a")
        record(store, 5, use(5), lineage="b", parent="a")
        record(store, 2, use(2), use(3), use(4), use(5), lineage="c", parent="b")
        audit = store.audit(RUN_ID)
        assert (audit.used, audit.used_twice, audit.unread) == (5, 0, 1)

    def test_an_abandoned_branch_does_not_count(self, store: TrajectoryStore) -> None:
        """A sibling that was given up is not on the way back from the newest lineage."""
        self.store_six(store)
        record(store, 1, use(1))
        record(store, 2, use(2), lineage="b", parent="a")
        record(store, 2, use(3), lineage="c", parent="a")
        audit = store.audit(RUN_ID)
        assert (audit.used, audit.unread) == (2, 4)

    def test_a_repeated_update_does_not_revive_its_lineage(self, store: TrajectoryStore) -> None:
        """Recording an old update again leaves the newest lineage the newest."""
        self.store_six(store)
        record(store, 1, use(1))
        record(store, 1, use(2), lineage="b")
        record(store, 1, use(1), version=3)
        assert store.audit(RUN_ID).used == 1
        assert store.learner_update(RUN_ID) == 1


class TestDemand:
    """The learner's demand is granted to clients as leases of steps (contracts E2)."""

    def test_the_newest_demand_counts(self, store: TrajectoryStore) -> None:
        """Setting the demand replaces it."""
        assert store.demand(RUN_ID) is None
        store.set_demand(RUN_ID, 0, 100)
        store.set_demand(RUN_ID, 1, 200)
        assert store.demand(RUN_ID) == (1, 200)

    def test_without_demand_nothing_is_granted(self, store: TrajectoryStore) -> None:
        """A learner that asks for nothing lets nobody act."""
        assert store.grant_steps(RUN_ID, "a", 10, 0, 60.0) == 0

    def test_the_pool_is_shared(self, store: TrajectoryStore) -> None:
        """Grants never exceed demand minus stored minus what others still hold."""
        store.set_demand(RUN_ID, 0, 100)
        store.commit([make_trajectory(1, steps=30)])
        assert store.grant_steps(RUN_ID, "a", 50, 0, 60.0) == 50
        assert store.grant_steps(RUN_ID, "b", 50, 0, 60.0) == 20
        assert store.grant_steps(RUN_ID, "a", 50, 0, 60.0) == 0

    def test_used_steps_leave_the_lease_when_stored(self, store: TrajectoryStore) -> None:
        """Steps that became data are counted by the store and no longer by the lease."""
        store.set_demand(RUN_ID, 0, 100)
        assert store.grant_steps(RUN_ID, "a", 60, 0, 60.0) == 60
        store.commit([make_trajectory(1, steps=60)])
        assert store.grant_steps(RUN_ID, "a", 60, 60, 60.0) == 40

    def test_expired_grants_return(self, store: TrajectoryStore) -> None:
        """What a silent client held is granted to others."""
        store.set_demand(RUN_ID, 0, 100)
        assert store.grant_steps(RUN_ID, "a", 100, 0, -1.0) == 100
        assert store.grant_steps(RUN_ID, "b", 100, 0, 60.0) == 100

    def test_wanting_nothing_renews(self, store: TrajectoryStore) -> None:
        """A heartbeat that wants 0 keeps what the client holds."""
        store.set_demand(RUN_ID, 0, 100)
        store.grant_steps(RUN_ID, "a", 100, 0, 60.0)
        assert store.grant_steps(RUN_ID, "a", 0, 10, 60.0) == 0
        assert store.grant_steps(RUN_ID, "b", 100, 0, 60.0) == 10

    def test_a_client_that_leaves_gives_its_steps_back(self, store: TrajectoryStore) -> None:
        """After a goodbye its unused steps are in the pool."""
        store.join_client(RUN_ID, "a", [], 0)
        store.set_demand(RUN_ID, 0, 100)
        store.grant_steps(RUN_ID, "a", 100, 0, 60.0)
        store.leave_client(RUN_ID, "a")
        assert store.grant_steps(RUN_ID, "b", 100, 0, 60.0) == 100

    def test_stored_beyond_the_demand_grants_nothing(self, store: TrajectoryStore) -> None:
        """A demand that late data overran grants 0, never less."""
        store.set_demand(RUN_ID, 0, 5)
        store.commit([make_trajectory(1, steps=30)])
        assert store.grant_steps(RUN_ID, "a", 50, 0, 60.0) == 0

    def test_concurrent_grants_stay_within_the_pool(self, store: TrajectoryStore) -> None:
        """Clients that ask at once get no more than there is."""
        store.set_demand(RUN_ID, 0, 100)
        with ThreadPoolExecutor(8) as pool:
            granted = list(pool.map(lambda i: store.grant_steps(RUN_ID, f"c{i}", 30, 0, 60.0), range(8)))
        assert sum(granted) == 100
