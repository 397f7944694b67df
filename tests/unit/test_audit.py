"""The surviving lineage of a run and the counters of a spool (contracts C2, G1)."""

from __future__ import annotations

from relayrl_shared.store.audit import Branch, Delivery, survivors
from relayrl_shared.store.sequences import SequenceSet
from relayrl_shared.store.spools import Spool, settle


def branch(parent: str | None, first: int, last: int, policy: str = "p") -> Branch:
    """A lineage of one policy."""
    return Branch(parent, {policy: (first, last)})


def test_no_lineage_survives_before_the_first_update() -> None:
    """Without updates nothing survives."""
    assert survivors({}, None) == []


def test_a_single_lineage_survives_whole() -> None:
    """A run that never resumed from an older checkpoint keeps all updates."""
    assert survivors({"a": branch(None, 1, 9)}, "a") == [("a", "p", 9)]


def test_each_ancestor_ends_where_its_descendants_began() -> None:
    """A parent survives up to the update before its child's first; a deeper cut holds for all above."""
    branches = {"a": branch(None, 1, 10), "b": branch("a", 7, 12), "c": branch("b", 4, 5)}
    assert survivors(branches, "c") == [("c", "p", 5), ("b", "p", 3), ("a", "p", 3)]
    assert survivors(branches, "b") == [("b", "p", 12), ("a", "p", 6)]


def test_siblings_do_not_survive() -> None:
    """Only the way back from the newest lineage counts."""
    branches = {"a": branch(None, 1, 4), "b": branch("a", 3, 8), "c": branch("a", 3, 3)}
    assert survivors(branches, "c") == [("c", "p", 3), ("a", "p", 2)]


def test_policies_are_cut_each_at_their_own_update() -> None:
    """Policies that stood at different updates are cut apart; one that the child lacks, at its earliest."""
    parent = Branch(None, {"x": (1, 9), "y": (1, 7), "z": (1, 9)})
    child = Branch("a", {"x": (6, 9), "y": (5, 6)})
    assert set(survivors({"a": parent, "b": child}, "b")) == {
        ("b", "x", 9),
        ("b", "y", 6),
        ("a", "x", 5),
        ("a", "y", 4),
        ("a", "z", 4),
    }


def test_a_parent_that_is_gone_or_circular_ends_the_way() -> None:
    """Rows that do not make a tree end the walk instead of hanging it."""
    assert survivors({"b": branch("gone", 3, 4)}, "b") == [("b", "p", 4)]
    circle = {"a": branch("b", 1, 2), "b": branch("a", 3, 4)}
    assert survivors(circle, "b") == [("b", "p", 4), ("a", "p", 2)]


def test_what_is_unexplained_is_missing() -> None:
    """Missing is what the identity leaves over."""
    delivery = Delivery(accepted=10, stored=4, quarantined=1, dropped=2, in_spool=2, stored_twice=0)
    assert delivery.missing == 1


def test_a_sequence_has_the_first_fate_that_settled_it() -> None:
    """Each sequence counts once, as what settled it first, in the batch or before."""
    spool = Spool("r", "s", known=SequenceSet(2), highest_seen=2)
    settled = settle(spool, [(1, "conflict"), (3, "known"), (3, "conflict"), (4, "conflict"), (6, "stored")])
    assert (settled.quarantined, settled.repeated, settled.highest_seen) == (1, 1, 6)
    assert settled.known == SequenceSet(4, ((6, 6),))


def test_what_a_spool_still_has() -> None:
    """Waiting counts unsettled sequences from the oldest unacknowledged one on, later ones included."""
    known = SequenceSet().add([(1, 3), (5, 5)])
    spool = Spool("r", "s", known=known, highest_seen=5, highest_accepted=7, oldest_unacknowledged=3)
    assert (spool.accepted, spool.waiting) == (7, 3)
    assert Spool("r", "s", known=known, highest_seen=5).waiting == 0
