"""Preemption costs nothing: killed after any optimizer step, a run ends with the weights it would have had anyway.

Every comparison is bit for bit (atol = rtol = 0): weights, both moments of the optimizer, the loss of every step, and
the exported files. Trainers are real processes that die by SIGKILL, with everything that they started, as a pod does;
they are forked from a warm one (`testkit.warm` says why that is fair), which keeps this file at a
minute and a half of CPU time.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load

from diffusion_api import names
from diffusion_api.outcomes import ExitCode
from testkit.attempts import TrainerJob
from testkit.tiny import make_image_folder, make_tiny_clip, make_tiny_sd1

STEPS = 6
KILLED = -9
SAVES = (0, 2, 3, 4, 6)
"""Every second step, and that of the first evaluation, which is the best one so far."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and a dataset: two shapes, so that batches differ in shape from step to step."""
    root = tmp_path_factory.mktemp("inputs")
    make_tiny_sd1(root / "model")
    make_tiny_clip(root / "clip")
    make_image_folder(root / "data", 11, sizes=((64, 64), (96, 64), (64, 64)))
    make_image_folder(root / "three-shapes", 14, sizes=((64, 64), (96, 64), (64, 96)))
    return root


def resumed_from(job):
    return job.last_word().get("resumedFromStep", 0)


def result(job):
    """Return everything that a run leaves: tensors by name, and the bytes of its files."""
    snapshot = job.ledger().load()
    assert snapshot is not None
    assert snapshot.step == STEPS
    tensors = {f"{g}/{n}": t for g, group in snapshot.tensors.items() for n, t in group.items()}
    files = [names.METRICS_FILE, "diffusers/pytorch_lora_weights.safetensors", "kohya/lora.safetensors"]
    contents = {name: (job.output / name).read_bytes() for name in files}
    best = job.head()["best"]
    return tensors, contents | {"best": json.dumps([best["step"], best["metric"], best["value"]]).encode()}


def assert_same(job, reference):
    """Compare two runs bit for bit."""
    tensors, files = result(job)
    wanted, wanted_files = reference
    assert_same_tensors(tensors, wanted)
    for name, content in wanted_files.items():
        assert files[name] == content, name


def assert_same_tensors(tensors, wanted):
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


VARIANTS = {
    "Lion, average, four micro-batches in bf16": {
        "training": {"optimizer": {"name": "Lion"}, "ema": {"enabled": True}, "mixedPrecision": "BF16"},
        "run": {"microBatchSize": 1},
    },
    "Adafactor, one micro-batch in fp16, three buckets": {
        "dataset": {"source": "three-shapes"},
        "training": {"optimizer": {"name": "Adafactor"}, "mixedPrecision": "FP16"},
        "run": {"microBatchSize": 4},
    },
    "Prodigy, average, recomputed": {
        "training": {
            "optimizer": {"name": "Prodigy"}, "learningRate": ..., "ema": {"enabled": True, "decay": 0.5},
            "gradientCheckpointing": "Always",
        },
    },
}  # fmt: skip
"""Each shows several things, at one step; `make nightly` kills after every step."""
EACH_ALONE = {
    "average": {"training": {"ema": {"enabled": True}}},
    "bf16": {"training": {"mixedPrecision": "BF16"}},
    "fp16": {"training": {"mixedPrecision": "FP16"}},
    "Lion": {"training": {"optimizer": {"name": "Lion"}}},
    "Adafactor": {"training": {"optimizer": {"name": "Adafactor"}}},
    "Adafactor with a first moment": {"training": {"optimizer": {"name": "Adafactor", "beta1": 0.9}}},
    "Prodigy": {"training": {"optimizer": {"name": "Prodigy"}, "learningRate": ...}},
    "one micro-batch": {"run": {"microBatchSize": 4}},
    "four micro-batches": {"run": {"microBatchSize": 1}},
    "one bucket": {"dataset": {"buckets": {"enabled": False}}},
}


@pytest.fixture
def job(tmp_path, inputs, trainers):
    return TrainerJob(tmp_path, inputs, trainers)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, inputs, trainers):
    """The undisturbed run."""
    undisturbed = TrainerJob(tmp_path_factory.mktemp("reference"), inputs, trainers)
    undisturbed.finish()
    return result(undisturbed)


def test_the_reference_moves(reference):
    """Comparisons of runs that learn nothing would prove nothing."""
    tensors, files = reference
    moved = [t for n, t in tensors.items() if n.startswith("model/") and n.endswith("lora_B.weight")]
    assert moved
    assert all(t.abs().max() > 1e-3 for t in moved)  # B starts at 0
    lines = [json.loads(line) for line in files[names.METRICS_FILE].decode().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert len({line["loss"] for line in lines}) == STEPS
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    shapes = {n for n in tensors if n.startswith("optimizer/")}
    assert len(shapes) == 3 * sum(n.startswith("model/") for n in tensors)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_after_any_step(job, reference, step, workers):
    assert job.attempt(failpoint=f"step:{step}:kill", workers=workers) == KILLED
    job.finish(workers=workers)
    # The last checkpoint may or may not have been acknowledged when the pod died; the one before it was, for a save
    # waits for the one before.
    assert resumed_from(job) in [save for save in SAVES if save < step][-2:]
    assert_same(job, reference)


@pytest.mark.parametrize("step", [2, 4])
def test_killed_while_a_checkpoint_is_uploaded(job, reference, step):
    assert job.attempt(failpoint=f"checkpoint:{step}:kill") == KILLED
    job.finish()
    assert resumed_from(job) in [save for save in SAVES if save <= step][-2:]
    assert_same(job, reference)


def varied(job, variant):
    job.overrides = {"training": variant.get("training", {})}
    if "dataset" in variant:
        dataset = job.spec()["dataset"] | variant["dataset"]
        if "source" in variant["dataset"]:
            dataset["source"] = f"file://{job.inputs}/{variant['dataset']['source']}"
        job.overrides["dataset"] = dataset
    job.run = variant.get("run", {})
    return job


_varied_references = {}


def reference_of(name, variant, tmp_path_factory, inputs, trainers):
    if name not in _varied_references:
        undisturbed = varied(TrainerJob(tmp_path_factory.mktemp("variant"), inputs, trainers), variant)
        undisturbed.finish()
        _varied_references[name] = result(undisturbed)
    return _varied_references[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_killed_after_a_step(job, tmp_path_factory, inputs, trainers, reference, name):
    wanted = reference_of(name, VARIANTS[name], tmp_path_factory, inputs, trainers)
    weights = [tensor for key, tensor in wanted[0].items() if key.startswith("model/")]
    assert not torch.equal(weights[1], [tensor for key, tensor in reference[0].items() if key.startswith("model/")][1])
    assert varied(job, VARIANTS[name]).attempt(failpoint="step:5:kill") == KILLED
    job.finish()
    assert resumed_from(job) in {2, 3, 4}
    assert_same(job, wanted)


@pytest.mark.nightly
@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("name", [*VARIANTS, *EACH_ALONE])
def test_every_variant_killed_after_any_step(job, tmp_path_factory, inputs, trainers, name, step):
    variant = (VARIANTS | EACH_ALONE)[name]
    wanted = reference_of(name, variant, tmp_path_factory, inputs, trainers)
    assert varied(job, variant).attempt(failpoint=f"step:{step}:kill") == KILLED
    job.finish()
    assert_same(job, wanted)


def test_the_average_is_what_is_evaluated_and_exported(job, reference):
    varied(job, EACH_ALONE["average"]).finish()
    tensors, files = result(job)
    exported = load(files["diffusers/pytorch_lora_weights.safetensors"])
    for name, tensor in tensors.items():
        group, _, parameter = name.partition("/")
        if group == "average":
            assert torch.equal(exported[f"unet.{parameter}"], tensor)
        if group in {"model", "optimizer"}:
            assert torch.equal(tensor, reference[0][name])  # the training itself is the same
    ours, theirs = (
        [json.loads(line).get("validation_loss") for line in found[names.METRICS_FILE].decode().splitlines()]
        for found in (files, reference[1])
    )
    assert ours[2] != theirs[2]


def test_going_back_is_repeated_by_a_run_that_was_killed(job, tmp_path_factory, inputs, trainers):
    """What a run has learned from going back is lost with its process, and learned again."""
    lose = [("lose_losses_while_the_rate_is_high", (3, 0.3))]
    variant = {"training": {"nonFinite": {"policy": "RollBack", "limit": 1}}}
    undisturbed = varied(TrainerJob(tmp_path_factory.mktemp("back"), inputs, trainers), variant)
    undisturbed.finish(seams=lose)
    warnings = undisturbed.last_word()["warnings"]
    assert [text.split(" of the")[0] for text in warnings if "back to" in text] == [
        "back to the newest checkpoint, with 0.5", "back to the newest checkpoint, with 0.25",
    ]  # fmt: skip
    lines = undisturbed.metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert None not in [line["loss"] for line in lines]
    assert varied(job, variant).attempt(seams=lose, failpoint="step:4:kill") == KILLED
    job.finish(seams=lose)
    assert_same(job, result(undisturbed))


def test_killed_twice(job, reference):
    assert job.attempt(failpoint="step:3:kill") == KILLED
    assert job.attempt(failpoint="step:5:kill", workers=2) == KILLED
    job.finish()
    assert_same(job, reference)


@pytest.mark.parametrize("seam", ["terminate_before_step", "terminate_twice_before_step"])
def test_preempted_by_sigterm(job, reference, seam):
    """The current step is finished and saved, so nothing at all is repeated."""
    assert job.attempt(seams=[(seam, 3)]) == ExitCode.YIELDED, job.log.read_text()
    word = job.last_word()
    assert (word["exitCode"], word["step"], word["latestCheckpoint"]["step"]) == (ExitCode.YIELDED, 3, 3)
    job.finish(workers=2)
    assert resumed_from(job) == 3
    assert_same(job, reference)


@pytest.mark.nightly  # below, another one is interrupted later on
def test_preempted_within_an_evaluation(job, reference):
    """The evaluation is left to the next attempt, which owes it before its first step."""
    assert job.attempt(seams=[("terminate_during_evaluation", 1)]) == ExitCode.YIELDED, job.log.read_text()
    assert job.last_word()["latestCheckpoint"]["step"] == 3
    job.finish()
    assert resumed_from(job) == 3
    assert_same(job, reference)


def test_scores_change_nothing_of_the_training(job, reference):
    """Nor does a stop while pictures are drawn for them: the next attempt owes the whole evaluation."""
    prompts = [{"prompt": "a thing", "steps": 2}]
    scores = {"model": f"file://{job.inputs}/clip", "images": 2}
    job.overrides = {"validation": {"everySteps": 3, "prompts": prompts, "scores": scores}}
    assert job.attempt(seams=[("terminate_while_scoring", 1)]) == ExitCode.YIELDED, job.log.read_text()
    assert job.last_word()["latestCheckpoint"]["step"] == 3
    assert "clip_score" not in (job.output / names.METRICS_FILE).read_text()
    job.finish()
    assert resumed_from(job) == 3
    lines = job.metrics()
    found = {line["step"]: (line.pop("clip_score"), line.pop("kid")) for line in lines if "clip_score" in line}
    assert sorted(found) == [3, 6]
    assert found[3] != found[6]
    progress = job.last_word()["progress"]
    assert (progress["clipScore"], progress["kid"]) == found[6]
    tensors, files = reference
    contents = result(job)[1] | {names.METRICS_FILE: "".join(json.dumps(line) + "\n" for line in lines).encode()}
    assert contents == files
    assert_same_tensors(result(job)[0], tensors)


def test_preempted_without_time_to_save(job, reference):
    """A grace period too short for a save costs the steps since the last checkpoint, and nothing else."""
    job.run = {"gracePeriodSeconds": 0}
    assert job.attempt(seams=[("terminate_before_step", 3)]) == ExitCode.YIELDED
    job.finish()
    assert resumed_from(job) in {0, 2}
    assert_same(job, reference)


def test_global_generators_do_not_matter(job, reference):
    poison = [("poison_global_generators", None)]
    assert job.attempt(failpoint="step:3:kill", seams=poison, workers=2) == KILLED
    job.finish(seams=poison)
    assert_same(job, reference)


def test_one_changed_key_is_found(job, reference):
    """Negative control: the noise of one step after the resume is another one."""
    assert job.attempt(failpoint="step:3:kill") == KILLED
    job.finish(seams=[("change_noise_of_step", 4)])
    with pytest.raises(AssertionError):
        assert_same(job, reference)


def test_micro_batch_changes_only_the_order_of_summation(job, reference):
    job.run = {"microBatchSize": 4}
    job.finish()
    tensors, _ = result(job)
    for name, tensor in reference[0].items():
        if name.startswith("curves/"):
            torch.testing.assert_close(tensors[name], tensor, atol=1e-4, rtol=1e-3)


def test_an_attempt_after_the_end_has_the_same_output(job, reference):
    job.finish()
    first = job.last_word()["output"]
    job.finish()
    assert job.last_word()["output"] == first
    assert {file["name"] for file in first} == {
        "README.md", "diffusers/pytorch_lora_weights.safetensors", "kohya/lora.safetensors",
    }  # fmt: skip
    assert "from step" not in job.log.read_text()
    assert_same(job, reference)


@pytest.mark.nightly
def test_new_interpreters_agree_with_forks(job, reference):
    """The same with nothing shared between the attempts, not even the seed of string hashes."""
    for hash_seed, failpoint, code in (("1", "step:3:kill", KILLED), ("2", "", 0)):
        environ = {**os.environ, **job.environ(failpoint=failpoint), "PYTHONHASHSEED": hash_seed}
        environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-m", "diffusion_trainer"]
        with job.log.open("w") as log:
            ended = subprocess.run(command, env=environ, stdout=log, stderr=log, check=False)
        assert ended.returncode == code, job.log.read_text()
    assert_same(job, reference)
