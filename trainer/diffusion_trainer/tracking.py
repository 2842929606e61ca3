"""`spec.tracking` and metrics.jsonl: the curves as files in the output destination."""

from __future__ import annotations

from pathlib import Path

from diffusion_api import names
from diffusion_trainer.courier import Courier
from diffusion_trainer.curves import Curves

TENSORBOARD_PREFIX = f"{names.LOGS_PREFIX}tensorboard/"


class Tracking:
    """Rewrites metrics.jsonl, and adds to this attempt's TensorBoard file. Everything leaves by courier."""

    def __init__(self, curves: Curves, courier: Courier, *, folder: Path | None, attempt: int, start_step: int) -> None:
        """`folder` is where event files grow, None for no TensorBoard.

        What an earlier attempt wrote of the steps after `start_step` is taken back: every step is there once.
        """
        self._curves = curves
        self._courier = courier
        self._folder = folder
        self._written = self._evaluated = start_step
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=start_step + 1, filename_suffix=f".attempt-{attempt}")

        if start_step:
            self.publish()

    def publish(self) -> None:
        """Send what the curves hold by now; their points must be settled."""
        self._courier.send(names.METRICS_FILE, self._curves.to_jsonl())
        if self._writer is None or self._folder is None:
            return
        for point in self._curves.since(self._written):
            self._writer.add_scalar("train/loss", point.loss, point.step)
            self._writer.add_scalar("train/learning_rate", point.learning_rate, point.step)
            self._writer.add_scalar("train/grad_norm", point.grad_norm, point.step)
            self._written = point.step
        for evaluation in self._curves.evaluations:
            if evaluation.step > self._evaluated:
                self._writer.add_scalar("validation/loss", evaluation.loss, evaluation.step)
        for scored in self._curves.scores:
            if scored.step > self._evaluated:
                for name, value in scored.named().items():
                    self._writer.add_scalar(f"validation/{name}", value, scored.step)
        self._evaluated = max(self._evaluated, self._curves.evaluated)
        self._writer.flush()
        for path in self._folder.iterdir():
            self._courier.send(TENSORBOARD_PREFIX + path.name, path)
