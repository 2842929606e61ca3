"""One training job and its attempts, without a cluster: what the operator would give a trainer, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_api import names
from diffusion_trainer.checkpoint import Ledger
from diffusion_trainer.objectstore import open_store
from testkit.warm import Seam, WarmTrainers

UID = "0000-test"


@dataclass
class TrainerJob:
    """A job on a tiny model; each of its attempts begins with an empty disk, as a new pod does.

    `inputs` holds `model/` and `data/`; `root` is empty and gets `out/`, the destination, and a folder per attempt.
    `overrides` replace sections of the spec, and fields of `training` one by one; `run` replaces fields of the
    RunConfig, `environment` adds variables.
    """

    root: Path
    inputs: Path
    trainers: WarmTrainers
    attempts: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def spec(self) -> dict[str, Any]:
        """Return the trainer's sections of the job."""
        spec: dict[str, Any] = {
            "method": "LoRA",
            "lora": {"rank": 4, "alpha": 4},
            "model": {"source": f"file://{self.inputs}/model"},
            "dataset": {
                "source": f"file://{self.inputs}/data",
                "resolution": 64,
                "filters": {"minSide": 32},
                "captions": {"dropout": 0.3},
                "validation": {"fraction": 0.2},
                "augmentation": {"variantsPerImage": 2, "crop": "Random"},
            },
            # A rate that moves the weights visibly, so that a wrong step cannot hide in rounding.
            "training": {
                "maxSteps": 6,
                "batchSize": 4,
                "learningRate": 1e-2,
                "lrSchedule": {"name": "Cosine", "warmupSteps": 1},
                "objective": {"noiseOffset": 0.05},
            },
            "validation": {"everySteps": 3},
            "checkpoint": {"interval": "2steps"},
            "output": {"destination": f"file://{self.root}/out", "formats": ["Diffusers", "Kohya"]},
            "tracking": {"tensorboard": False},
        }
        overrides = dict(self.overrides)
        training = spec["training"] | overrides.pop("training", {})
        return spec | overrides | {"training": {k: v for k, v in training.items() if v is not ...}}

    def environ(self, *, failpoint: str = "", workers: int = 0) -> dict[str, str]:
        """Begin the next attempt: write its run file and return its environment."""
        self.attempts += 1
        (self.folder / "work").mkdir(parents=True)
        run = {
            "job": {"name": "tiny", "namespace": "test", "uid": UID},
            "attempt": self.attempts,
            "device": "CPU",
            "microBatchSize": 2,
            "spec": self.spec(),
        }
        (self.folder / "run.json").write_text(json.dumps(run | self.run))
        return {
            names.ENV_RUN_FILE: str(self.folder / "run.json"),
            names.ENV_WORK_DIR: str(self.folder / "work"),
            names.ENV_TERMINATION_LOG: str(self.folder / "last-word.json"),
            names.ENV_FAILPOINT: failpoint,
            "DIFFUSION_LOADER_WORKERS": str(workers),
            "DIFFUSION_METRICS_PORT": "0",
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }

    def attempt(self, *, seams: Sequence[Seam] = (), failpoint: str = "", workers: int = 0) -> int:
        """Do one attempt to its end and return its exit code, or minus the signal that killed it."""
        self.trainers.start(self.environ(failpoint=failpoint, workers=workers), log=self.log, seams=seams)
        return self.trainers.wait()

    def finish(self, *, seams: Sequence[Seam] = (), workers: int = 0) -> None:
        """Do one attempt that must complete."""
        code = self.attempt(seams=seams, workers=workers)
        assert code == 0, self.log.read_text()

    @property
    def folder(self) -> Path:
        """The folder of the last attempt."""
        return self.root / f"attempt-{self.attempts}"

    @property
    def log(self) -> Path:
        """The log of the last attempt."""
        return self.folder / "log"

    @property
    def output(self) -> Path:
        """The destination."""
        return self.root / "out"

    def last_word(self) -> dict[str, Any]:
        """Return the termination message of the last attempt."""
        word: dict[str, Any] = json.loads((self.folder / "last-word.json").read_text())
        return word

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of the curves at the destination."""
        return [json.loads(line) for line in (self.output / names.METRICS_FILE).read_text().splitlines()]

    def ledger(self) -> Ledger:
        """Return the ledger of the checkpoints, to read from."""
        store = open_store(f"file://{self.output}/{names.checkpoint_prefix(UID)}")
        return Ledger(store, attempt=99, run_spec_sha=self.head()["run_spec_sha"])

    def head(self) -> dict[str, Any]:
        """Return what HEAD.json says."""
        head: dict[str, Any] = json.loads((self.output / names.checkpoint_prefix(UID) / "HEAD.json").read_text())
        return head
