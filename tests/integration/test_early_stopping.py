"""Early stopping ends a run at the right evaluation and exports its best weights, also when it is interrupted.

The overfit is planted: from some step on, weights grow beyond what was learnt, and the loss on the held-out images
rises. Everything is compared with one undisturbed run without early stopping on the same machine: the rule is applied
to its curve by hand. The dataset has several concepts and every augmentation.
"""

import pytest
import torch
from safetensors.torch import load_file

from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder, make_tiny_sd1

STEPS, EVERY, PATIENCE = 12, 2, 2
OVERFIT = [("overshoot_from", 4)]
WEIGHTS = "diffusers/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_tiny_sd1(root / "model")
    make_image_folder(root / "dogs", 3, captions="None", seed=1)
    make_image_folder(root / "cats", 4, seed=2)
    return root


def job_of(root, inputs, trainers, *, stopping=None):
    # Everything that a dataset may ask for, so that an interruption is seen to change nothing of it.
    dataset = {
        "concepts": [
            {"source": f"file://{inputs}/dogs", "prompt": "sks, dog, red, blue", "weight": 1.5},
            {"source": f"file://{inputs}/cats"},
        ],
        "resolution": 64,
        "filters": {"minSide": 32, "minSharpness": 0.001},
        "captions": {"dropout": 0.3, "shuffleTags": True},
        "validation": {"fraction": 0.3},
        "augmentation": {"variantsPerImage": 2, "crop": "Random", "rotateDegrees": 10, "colorJitter": 0.1},
    }
    overrides = {
        "dataset": dataset,
        "training": {"maxSteps": STEPS, "batchSize": 2},
        "validation": {"everySteps": EVERY, "earlyStopping": stopping},
        "checkpoint": {"interval": "5steps"},
    }
    return TrainerJob(root, inputs, trainers, overrides=overrides)


def curve(job):
    lines = job.metrics()
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def pinned(job):
    found = job.ledger().load_best()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inputs, trainers):
    """The run that takes all its steps."""
    job = job_of(tmp_path_factory.mktemp("whole"), inputs, trainers)
    job.finish(seams=OVERFIT)
    return job


def expected_stop(losses):
    """Apply the rule by hand: the step of the second evaluation in a row that is not below the lowest before it."""
    best, waited = float("inf"), 0
    for step, loss in losses.items():
        waited = 0 if loss < best else waited + 1
        best = min(best, loss)
        if waited == PATIENCE:
            return step
    raise AssertionError(f"nothing was planted: {losses}")


def test_without_early_stopping_the_last_weights_are_worse_and_the_best_are_kept(whole):
    losses = curve(whole)
    best = min(losses, key=losses.get)
    assert sorted(losses) == list(range(EVERY, STEPS + 1, EVERY))
    assert losses[STEPS] > 1.005 * losses[best]
    assert pinned(whole).step == best
    word = whole.last_word()
    assert word["bestCheckpoint"] == {"step": best, "metric": "validation_loss", "value": losses[best]}
    assert "stoppedEarlyAt" not in word
    assert word["message"] == "all steps are done and the results are exported"


@pytest.mark.parametrize("killed", [False, True])
def test_it_stops_at_the_right_evaluation_and_exports_the_best_weights(tmp_path, inputs, trainers, whole, killed):
    losses = curve(whole)
    stop, best = expected_stop(losses), min(losses, key=losses.get)
    assert best < stop < STEPS
    job = job_of(tmp_path, inputs, trainers, stopping={"patience": PATIENCE, "minDelta": 0})
    if killed:  # within the patience, so that the evaluations before have to be remembered
        assert job.attempt(failpoint=f"step:{stop - 1}:kill", seams=OVERFIT) == -9
    job.finish(seams=OVERFIT)
    assert curve(job) == {step: loss for step, loss in losses.items() if step <= stop}
    word = job.last_word()
    assert word["stoppedEarlyAt"] == stop
    assert word["step"] == stop
    assert f"stopped early after step {stop} of {STEPS}" in word["message"]
    assert f"the weights of step {best} (validation loss {losses[best]:.4g}) are exported" in word["message"]
    kept = pinned(whole)
    for name, tensor in pinned(job).tensors["model"].items():
        torch.testing.assert_close(tensor, kept.tensors["model"][name], atol=0, rtol=0)
    exported, last = (load_file(one.output / WEIGHTS) for one in (job, whole))
    assert exported.keys() == last.keys()
    assert any(not torch.equal(exported[name], last[name]) for name in exported)  # not the last ones
    assert {tensor.numpy().tobytes() for tensor in exported.values()} == {
        tensor.numpy().tobytes() for tensor in kept.tensors["model"].values()
    }
    assert f"for {best} steps" in (job.output / "README.md").read_text()
    job.finish()  # an attempt after the end says the same
    assert (job.last_word()["message"], job.last_word()["stoppedEarlyAt"]) == (word["message"], stop)
