"""The metrics of a learner: made once, set after every update, shown at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_PREFIX = "relayrl_training_server_learner"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class LearnerMetrics:
    """One attribute a metric; labels take few values."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.updates = self._counter("updates_total", "Finished updates of this process.")
        self.steps = self._counter("steps_total", "Steps that were learned from.")
        self.trajectories = Counter(
            f"{_PREFIX}_trajectories_total", "Decided trajectories.", ["outcome"], registry=registry
        )
        self.left_out = self._counter(
            "actors_left_out_total", "Silent actors that a rollout went on without."
        )
        self.update_seconds = self._histogram("update_seconds", "Time of an update's gradient steps.")
        self.checkpoint_seconds = self._histogram("checkpoint_seconds", "Time to write a checkpoint durably.")
        self.publish_seconds = self._histogram("publish_seconds", "Time to publish and record an update.")
        self.learner_update = self._gauge("learner_update", "Finished updates of the run.")
        self.policy_version = self._gauge("policy_version", "The last published version.")
        self.policy_lag = self._gauge("policy_lag_updates", "The largest policy lag in the last batch.")
        self.mean_return = self._gauge("mean_return", "Mean return of the last 100 training episodes.")
        self.ratio_deviation = self._gauge(
            "first_ratio_deviation", "Largest |importance ratio - 1| of the last update's first minibatch."
        )
        self.entropy = self._gauge("entropy", "Mean entropy of the policy in the last update.")

    def watch_queue(self, pending: Callable[[], int]) -> None:
        """Shows how many updates wait for the registry or the store."""
        gauge = self._gauge("pending_publications", "Updates that registry or store do not have yet.")
        gauge.set_function(pending)

    def note(self, learned: Mapping[str, float], outcomes: Mapping[str, int]) -> None:
        """Takes in what an update measured."""
        self.updates.inc()
        self.steps.inc(learned["batch_steps"])
        for outcome, count in outcomes.items():
            self.trajectories.labels(outcome).inc(count)
        for gauge, name in ((self.ratio_deviation, "first_ratio_deviation"), (self.entropy, "entropy")):
            if name in learned:
                gauge.set(learned[name])

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, buckets=_SECONDS, registry=self.registry)
