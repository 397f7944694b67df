"""Shipped helpers for tests of the learner: hand-made segments, a registry in memory, actors."""
