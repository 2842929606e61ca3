"""The trainer's Prometheus metrics: base units, no unbounded labels, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "diffusion_trainer_"
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_CHECKPOINT_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 1800)


class Metrics:
    """One attribute per metric. Not finite values are counted: as gauges they would vanish from graphs."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=registry)

        self.step = gauge("step", "Optimizer steps done")
        self.total_steps = gauge("total_steps", "Optimizer steps of the whole run")
        self.epoch = gauge("epoch", "Passes over the dataset done")
        self.loss = gauge("loss", "Training loss, averaged over the last report interval")
        self.learning_rate = gauge("learning_rate", "Learning rate of the last step")
        self.grad_norm = gauge("grad_norm", "Norm of the gradient before clipping at the last report")
        self.validation_loss = gauge("validation_loss", "Loss on the held-out images at the last evaluation")
        self.clip_score = gauge("clip_score", "CLIP score of drawn pictures at the last evaluation, 0 to 100")
        self.kid = gauge("kid", "Kernel distance of drawn and held-out pictures at the last evaluation")
        self.samples = counter("samples", "Images trained on in this attempt")
        self.step_duration = Histogram(
            PREFIX + "step_duration_seconds",
            "Time between two optimizer steps, waiting for data included",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.data_wait = counter("data_wait_seconds", "Time that steps waited for their batch")
        self.skipped_steps = counter("skipped_steps", "Steps that changed nothing, for they had no finite numbers")
        self.nonfinite_loss = counter("nonfinite_loss", "Steps whose loss was no finite number")
        self.last_step = gauge("last_step_timestamp_seconds", "Time of the last optimizer step")
        self.checkpoint_duration = Histogram(
            PREFIX + "checkpoint_duration_seconds",
            "Time of checkpoint operations: save is how long training stood still",
            ["op"],
            buckets=_CHECKPOINT_BUCKETS,
            registry=registry,
        )
        self.checkpoint_bytes = gauge("checkpoint_bytes", "Size of the last acknowledged checkpoint")
        self.checkpoints = counter("checkpoints", "Checkpoints by result", "result")
        self.last_checkpoint = gauge("last_checkpoint_timestamp_seconds", "Time of the last acknowledged checkpoint")
        for result in ("acknowledged", "skipped"):
            self.checkpoints.labels(result)  # present from the start, so that rates see the first one

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)
