"""Several training processes, in one pod and in two: they train what one process would, stop as one, and end as one.

Processes are forked where that is fair (`seams.fork_processes`); the reference starts interpreters, as pods do.
"""

import json
import os
import signal
import socket

import pytest
import torch

from diffusion_api import names
from diffusion_api.outcomes import ExitCode
from testkit.attempts import UID, TrainerJob
from testkit.tiny import make_image_folder, make_tiny_clip, make_tiny_sd1
from testkit.waiting import wait_until
from testkit.warm import WarmTrainers

STEPS = 6
KILLED = 128 + signal.SIGKILL
FORK = ("fork_processes", None)
TWO = {"processesPerNode": 2, "microBatchSize": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and a dataset: two shapes, so that batches differ in shape from step to step."""
    root = tmp_path_factory.mktemp("inputs")
    make_tiny_sd1(root / "model")
    make_image_folder(root / "data", 11, sizes=((64, 64), (96, 64), (64, 64)))
    return root


@pytest.fixture
def job(tmp_path, inputs, trainers):
    return TrainerJob(tmp_path, inputs, trainers, run=dict(TWO))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs, trainers):
    """Two processes to which nothing happens."""
    two = TrainerJob(tmp_path_factory.mktemp("two"), inputs, trainers, run=dict(TWO))
    two.finish()
    return two


def tensors_of(job):
    snapshot = job.ledger().load()
    assert snapshot is not None
    assert snapshot.step == STEPS
    return {f"{g}/{n}": t for g, group in snapshot.tensors.items() for n, t in group.items()}


def assert_same(job, other, *, atol=0.0):
    found, wanted = tensors_of(job), tensors_of(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def words(job):
    """Return the last words of the training processes, in the order of the ranks."""
    return [json.loads(path.read_text()) for path in sorted((job.folder / "work" / "words").glob("*.json"))]


@pytest.mark.parametrize(
    ("micro_batch", "learning_rate", "atol"),
    [
        (2, 1e-2, 0.0),  # one piece for each: the same two summands
        (1, 1e-3, 1e-6),  # two pieces for each: (a + b) + (c + d) is not ((a + b) + c) + d
    ],
)
def test_two_processes_train_what_one_would(tmp_path, inputs, trainers, micro_batch, learning_rate, atol):
    """With gradients that are clipped, an average of the weights, and several micro-batches for each."""
    jobs = []
    for processes in (1, 2):
        run = {"processesPerNode": processes, "microBatchSize": micro_batch}
        job = TrainerJob(tmp_path / str(processes), inputs, trainers, run=run)
        clipped = {"maxGradNorm": 0.01}
        job.overrides = {
            "training": {"learningRate": learning_rate, "optimizer": clipped, "ema": {"enabled": True}},
            "validation": {"everySteps": 3, "prompts": [{"prompt": word, "steps": 1} for word in ("a", "b", "c")]},
        }
        job.finish(seams=[FORK])
        jobs.append(job)
    assert_same(*jobs, atol=atol)
    curves = [job.metrics() for job in jobs]
    for ours, theirs in zip(*curves, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        if "validation_loss" in ours:
            assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-6)
    assert sum("validation_loss" in line for line in curves[0]) == 2
    assert min(line["grad_norm"] for line in curves[0]) > clipped["maxGradNorm"]
    assert any(name.startswith("average/") for name in tensors_of(jobs[0]))
    grids = [
        {path.name: path.read_bytes() for path in (job.output / names.SAMPLES_PREFIX).glob("*.png")} for job in jobs
    ]
    assert set(grids[0]) == set(grids[1]) == {"step-00000003.png", "step-00000006.png"}
    assert grids[0] == grids[1] or atol  # weights that differ in the last bit may round to another colour


@pytest.mark.nightly
def test_two_processes_find_the_scores_that_one_does(tmp_path, inputs, trainers):
    make_tiny_clip(tmp_path / "clip")
    scores = {"model": f"file://{tmp_path}/clip", "images": 3}
    found = []
    for processes in (1, 2):
        run = {"processesPerNode": processes, "microBatchSize": 2}
        job = TrainerJob(tmp_path / str(processes), inputs, trainers, run=run)
        prompts = [{"prompt": "a thing", "steps": 2}]
        job.overrides = {
            "dataset": job.spec()["dataset"] | {"validation": {"fraction": 0.3}},
            "validation": {"everySteps": 3, "prompts": prompts, "scores": scores},
        }
        job.finish(seams=[FORK])
        lines = job.metrics()
        found.append([(line["step"], line["clip_score"], line["kid"]) for line in lines if "clip_score" in line])
    assert [step for step, *_ in found[0]] == [3, STEPS]
    assert found[0] == found[1]


def test_only_rank_0_writes_and_speaks(undisturbed):
    log = undisturbed.log.read_text()
    assert log.count("progress and metrics on port") == 1
    assert log.count("acknowledged") == len({line for line in log.splitlines() if "acknowledged" in line})
    word = undisturbed.last_word()
    assert (word["step"], word["latestCheckpoint"]["step"]) == (STEPS, STEPS)
    assert {file["name"] for file in word["output"]} >= {"kohya/lora.safetensors"}
    assert [word.get("latestCheckpoint") is not None for word in words(undisturbed)] == [True, False]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_killed_process_ends_the_attempt_and_costs_nothing(job, undisturbed, rank):
    assert job.attempt(failpoint=f"step:3:kill:{rank}", seams=[FORK]) == KILLED, job.log.read_text()
    word = job.last_word()
    assert word["exitCode"] == KILLED
    assert f"process {rank} was ended by SIGKILL" in word["message"]
    job.finish(seams=[FORK])
    assert job.last_word()["resumedFromStep"] == 2
    assert_same(job, undisturbed)


def test_the_wrong_noise_is_found(job, undisturbed):
    """Negative control: one process draws other noise for one step."""
    job.finish(seams=[FORK, ("in_rank", (1, "change_noise_of_step", 4))])
    with pytest.raises(AssertionError):
        assert_same(job, undisturbed, atol=1e-6)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_stop_ends_all_after_the_same_step(job, undisturbed, rank):
    seams = [FORK, ("in_rank", (rank, "terminate_pod_before_step", 3))]
    assert job.attempt(seams=seams) == ExitCode.YIELDED, job.log.read_text()
    step = job.last_word()["step"]
    assert [(word["exitCode"], word["step"]) for word in words(job)] == [(ExitCode.YIELDED, step)] * 2
    assert job.last_word()["latestCheckpoint"]["step"] == step
    job.finish(seams=[FORK])
    assert job.last_word()["resumedFromStep"] == step
    assert_same(job, undisturbed)


@pytest.mark.parametrize(
    ("seam", "code", "text"),
    [
        (("fail_before_step", (3, "out-of-memory")), ExitCode.CUDA_OUT_OF_MEMORY, "a single image"),
        pytest.param(
            ("lack_memory_in_update", 3), ExitCode.CUDA_OUT_OF_MEMORY, "does not fit", marks=pytest.mark.nightly
        ),
        (("fail_before_step", (3, "bug")), 1, "ZeroDivisionError"),
        (("hang_before_step", 3), ExitCode.HANG, "stallSeconds"),
    ],
)
def test_what_happened_to_one_is_what_happened(job, seam, code, text):
    """The others only lost it, or wait for it, which is no news."""
    job.run |= {"stallSeconds": 8}
    assert job.attempt(seams=[FORK, ("in_rank", (1, *seam))]) == code, job.log.read_text()
    assert job.last_word()["exitCode"] == code
    assert text in job.last_word()["message"]
    folder = names.attempt_logs(UID, 1)
    assert job.last_word()["log"] == f"file://{job.output}/{folder}"
    kept = (job.output / folder / "rank-1.log").read_text()
    assert "rank 1: " in kept
    assert text in kept


def test_short_memory_of_one_costs_all_of_them_nothing(job, undisturbed):
    """One process has room for single images only. The others take single images then, too, of the same batch."""
    job.run |= {"microBatchSize": 2}
    job.finish(seams=[FORK, ("in_rank", (1, "fail_above", 1))])
    assert [word["microBatchSize"] for word in words(job)] == [1, 1]
    assert "step 1 did not fit into the GPU's memory: micro-batch 1 instead of 2" in job.last_word()["warnings"]
    assert_same(job, undisturbed)


def test_the_micro_batch_is_what_fits_all_of_them(job, undisturbed):
    job.run |= {"microBatchSize": None}
    job.finish(seams=[FORK, ("in_rank", (0, "limit_memory", 2)), ("in_rank", (1, "limit_memory", 1))])
    assert [word["microBatchSize"] for word in words(job)] == [1, 1]
    assert job.last_word().get("warnings", []) == undisturbed.last_word().get("warnings", [])
    assert_same(job, undisturbed)


def test_all_of_them_go_back(tmp_path, inputs, trainers):
    jobs = []
    for processes in (1, 2):
        jobs.append(TrainerJob(tmp_path / str(processes), inputs, trainers, run={"processesPerNode": processes}))
        jobs[-1].overrides = {"training": {"nonFinite": {"policy": "RollBack", "limit": 1}}}
        jobs[-1].finish(seams=[FORK, ("lose_losses_while_the_rate_is_high", (3, 0.5))])
        assert any("back to the newest checkpoint" in text for text in jobs[-1].last_word()["warnings"])
    assert_same(*jobs)


def test_a_batch_that_cannot_be_shared(job):
    job.overrides = {"training": {"batchSize": 5}}
    assert job.attempt(seams=[FORK]) == ExitCode.BAD_CONFIG, job.log.read_text()
    assert "use a multiple of 2" in job.last_word()["message"]


# --- two pods ---


@pytest.fixture
def nodes(tmp_path, inputs, trainers):
    """Two pods of one job, each with a disk of its own."""
    with socket.socket() as found, WarmTrainers() as others:
        found.bind(("127.0.0.1", 0))
        run = {"nodes": 2, "microBatchSize": 1, "rendezvous": {"host": "127.0.0.1", "port": found.getsockname()[1]}}
        first = TrainerJob(tmp_path / "0", inputs, trainers, run=run | {"nodeRank": 0})
        second = TrainerJob(tmp_path / "1", inputs, others, run=run | {"nodeRank": 1})
        second.overrides = {"output": first.spec()["output"]}
        found.close()
        yield first, second


def attempt(nodes, *, failpoint="", seams=()):
    """Do one attempt of both pods; return their exit codes."""
    for node in nodes:
        node.trainers.start(node.environ(failpoint=failpoint), log=node.log, seams=[FORK, *seams])
    return [node.trainers.wait() for node in nodes]


def test_two_pods_lose_one_and_end_with_the_same_weights(nodes, undisturbed):
    assert attempt(nodes, failpoint="step:3:kill:1") == [ExitCode.COLLECTIVE_TIMEOUT, KILLED]
    assert nodes[0].last_word()["step"] in {2, 3}
    assert attempt(nodes) == [0, 0], nodes[0].log.read_text() + nodes[1].log.read_text()
    assert nodes[0].last_word()["resumedFromStep"] == 2
    assert_same(nodes[0], undisturbed)


@pytest.mark.nightly
def test_a_stop_of_one_pod_stops_both(nodes, undisturbed):
    codes = attempt(nodes, seams=[("in_rank", (1, "terminate_pod_before_step", 3))])
    assert codes == [ExitCode.YIELDED] * 2, nodes[0].log.read_text() + nodes[1].log.read_text()
    steps = [node.last_word()["step"] for node in nodes]
    assert steps[0] == steps[1] == nodes[0].last_word()["latestCheckpoint"]["step"]
    assert attempt(nodes) == [0, 0]
    assert_same(nodes[0], undisturbed)


def test_a_pod_that_waits_for_another_leaves_at_once_when_told(nodes):
    first = nodes[0]
    pid = first.trainers.start(first.environ(), log=first.log, seams=[FORK])
    wait_until(
        lambda: "training processes on node 0" in (first.log.read_text() if first.log.exists() else ""),
        describe="the launcher",
        timeout=60,
    )
    os.kill(pid, signal.SIGTERM)
    assert first.trainers.wait() == ExitCode.YIELDED
    assert first.last_word()["exitCode"] == ExitCode.YIELDED
