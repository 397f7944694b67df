"""Revisions of the trajectories tables."""
