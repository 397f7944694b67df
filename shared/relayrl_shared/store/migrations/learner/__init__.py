"""Revisions of the learner tables."""
