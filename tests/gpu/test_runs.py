"""Runs in deterministic mode, killed and resumed, end with the weights of one that was left alone, bit for bit."""

import pytest
import torch

from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder, make_tiny_sd1
from testkit.warm import WarmTrainers

STEPS = 5
KILLED = -9
FINE_TUNE = {"method": "FineTune", "lora": None, "output": {"formats": ["Diffusers"]}}
RUNS = {
    "adapters in bf16": {"training": {"mixedPrecision": "BF16"}},
    "everything in fp16": FINE_TUNE | {"training": {"mixedPrecision": "FP16"}},
    "everything in bf16 with moments of 8 bits": FINE_TUNE
    | {"training": {"mixedPrecision": "BF16", "optimizer": {"name": "AdamW8bit"}}},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_tiny_sd1(root / "model")
    make_image_folder(root / "data", 9, sizes=((64, 64), (96, 64)))
    return root


@pytest.fixture(scope="module")
def trainers():
    with WarmTrainers() as started:
        yield started


def weights_of(job):
    """Return the tensors of the last checkpoint: weights, optimizer, averages, curves."""
    snapshot = job.ledger().load()
    assert snapshot is not None
    assert snapshot.step == STEPS
    return {f"{group}/{name}": tensor for group, found in snapshot.tensors.items() for name, tensor in found.items()}


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed(device, tmp_path, inputs, trainers, name):
    found = []
    for failpoint in ("", "step:4:kill"):
        (tmp_path / failpoint).mkdir(exist_ok=True)
        job = TrainerJob(tmp_path / failpoint, inputs, trainers, run={"device": device})
        for section, value in RUNS[name].items():
            before = job.spec().get(section)
            job.overrides[section] = {**before, **value} if before and value and section != "method" else value
        job.overrides["training"] |= {"maxSteps": STEPS, "deterministic": True}
        if failpoint:
            assert job.attempt(failpoint=failpoint) == KILLED, job.log.read_text()
        job.finish()
        found.append(weights_of(job))
    undisturbed, resumed = found
    assert undisturbed.keys() == resumed.keys()
    assert [key for key, tensor in undisturbed.items() if not torch.equal(tensor, resumed[key])] == []
    assert any(tensor.dtype == torch.uint8 for tensor in resumed.values()) == ("8 bits" in name)
