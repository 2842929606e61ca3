"""Every way in which a trainer can end: its exit code, its last word, and that nothing of it stays behind."""

import json
import os
import signal
import subprocess
import sys

import pytest

from diffusion_api import names
from diffusion_api.outcomes import ExitCode
from diffusion_api.run import MAX_LAST_WORD_BYTES, LastWord, ProgressReport
from diffusion_trainer.objectstore import Credentials, open_store
from testkit.attempts import UID, TrainerJob
from testkit.s3 import S3Server
from testkit.tiny import make_image_folder, make_tiny_sd1
from testkit.waiting import wait_until

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_tiny_sd1(root / "model")
    make_image_folder(root / "data", 8)
    return root


@pytest.fixture
def job(tmp_path, inputs, trainers):
    return TrainerJob(tmp_path, inputs, trainers)


def test_an_undisturbed_run(job):
    job.overrides = {
        "tracking": {"tensorboard": True},
        "output": {"destination": f"file://{job.output}", "formats": ["Diffusers", "Kohya", "SingleFile"]},
        "validation": {"everySteps": 3, "prompts": [{"prompt": "a cat", "steps": 2}, {"prompt": "a dog", "steps": 1}]},
    }
    assert job.attempt() == ExitCode.DONE, job.log.read_text()
    assert (job.folder / "last-word.json").stat().st_size <= MAX_LAST_WORD_BYTES
    word = LastWord.model_validate(job.last_word())
    assert (word.step, word.progress.percentage, word.latest_checkpoint.step) == (STEPS, 100, STEPS)
    assert word.progress.validation_loss > 0
    assert [file.name for file in word.output] == [
        "diffusers/pytorch_lora_weights.safetensors", "kohya/lora.safetensors", "single-file/model.safetensors",
        "README.md",
    ]  # fmt: skip
    assert all((job.output / file.name).stat().st_size == file.bytes for file in word.output)
    samples = sorted(path.name for path in (job.output / names.SAMPLES_PREFIX).glob("*.png"))
    assert samples == ["step-00000003.png", "step-00000006.png"]
    assert (job.output / names.checkpoint_prefix(UID) / "dataset.lock.json").exists()
    assert "from_pretrained" in (job.output / "README.md").read_text()
    assert _scalars(job) == list(range(1, STEPS + 1))


def test_tensorboard_shows_every_step_once_after_a_resume(job):
    job.overrides = {"tracking": {"tensorboard": True}, "checkpoint": {"interval": "2steps"}}
    assert job.attempt(failpoint="step:5:kill") == -signal.SIGKILL
    job.finish()
    assert _scalars(job) == list(range(1, STEPS + 1))


def _scalars(job):
    """Return the steps of the loss as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job.output / names.LOGS_PREFIX / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


@pytest.mark.parametrize(
    ("overrides", "run", "code", "words"),
    [
        ({"model": {"source": "file:///nowhere/at/all/"}}, {}, ExitCode.INPUT_MISSING, ["/nowhere/at/all"]),
        ({"dataset": {"source": "file:///nowhere/at/all/"}}, {}, ExitCode.INPUT_MISSING, ["/nowhere/at/all"]),
        (
            {"credentials": {"secretRef": {"name": "s3"}}},
            {},
            ExitCode.NO_PERMISSION,
            ["AWS_ACCESS_KEY_ID", "secretRef"],
        ),
        ({}, {"device": "CUDA"}, ExitCode.GPU_FAULT, ["GPU"]),
        ({"output": {"destination": "gs://bucket/x/"}}, {}, ExitCode.BAD_CONFIG, ["gs://"]),
    ],
)
def test_what_cannot_be_trained_says_why(job, overrides, run, code, words):
    job.overrides = overrides
    job.run = run
    assert job.attempt() == code, job.log.read_text()
    word = job.last_word()
    assert word["exitCode"] == code
    for text in words:
        assert text in word["message"]


def test_no_cpu_where_a_gpu_was_asked_for(job):
    """A run that falls back to the CPU costs a GPU and never ends."""
    job.run = {"device": "CUDA"}
    assert job.attempt() == ExitCode.GPU_FAULT
    assert not (job.output / names.METRICS_FILE).exists()


def test_a_run_file_that_cannot_be_read(job):
    environ = job.environ()
    (job.folder / "run.json").write_text('{"attempt": "many"}')
    job.trainers.start(environ, log=job.log)
    assert job.trainers.wait() == ExitCode.BAD_CONFIG
    assert "run.json" in job.last_word()["message"]


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("out-of-memory", ExitCode.CUDA_OUT_OF_MEMORY, "a single image does not fit"),
        ("gpu", ExitCode.GPU_FAULT, "unspecified launch failure"),
        ("bug", 1, "ZeroDivisionError: a bug"),
    ],
)
def test_failures_of_a_step(job, kind, code, words):
    assert job.attempt(seams=[("fail_before_step", [5, kind])]) == code, job.log.read_text()
    word = job.last_word()
    assert words in word["message"]
    assert word["step"] == 4
    assert word["latestCheckpoint"]["step"] in {3, 4}  # of step 3 for its evaluation, of step 4 by its turn
    if code == 1:
        assert "ZeroDivisionError" in word["lastLines"]
    folder = names.attempt_logs(UID, 1)
    assert word["log"] == f"file://{job.output}/{folder}"
    kept = (job.output / folder / "rank-0.log").read_text()
    assert "attempt 1 of" in kept
    assert words in kept
    job.finish()  # nothing is in the way of the next attempt
    assert job.last_word()["resumedFromStep"] == 4  # what was in flight was finished first


def test_a_damaged_checkpoint_is_stepped_over_and_no_longer_told_of(job):
    assert job.attempt(seams=[("fail_before_step", [5, "bug"])]) == 1
    (newest,) = (job.output / names.checkpoint_prefix(UID) / "ckpt").glob("*4-a0001*/MANIFEST.json")
    newest.write_text("{}")
    assert job.attempt(seams=[("fail_before_step", [1, "bug"])]) == 1
    word = job.last_word()
    assert (word["resumedFromStep"], word["latestCheckpoint"]["step"]) == (3, 3)


def test_a_diverged_run_saves_nothing_of_it(job):
    job.overrides = {"training": {"nonFinite": {"limit": 2}}}
    assert job.attempt(seams=[("lose_every_loss_from_step", 3)]) == ExitCode.DIVERGED, job.log.read_text()
    word = job.last_word()
    assert "2 steps in a row were skipped, up to step 4" in word["message"]
    assert ".png" in word["message"] or ".jpg" in word["message"] or ".webp" in word["message"]
    assert "learningRate" in word["message"]
    assert word["latestCheckpoint"]["step"] == 2


def test_going_back_does_not_help_for_ever(job):
    job.overrides = {"training": {"nonFinite": {"policy": "RollBack", "limit": 1}}}
    seams = [("lose_losses_while_the_rate_is_high", (0, 0.0))]
    assert job.attempt(seams=seams) == ExitCode.DIVERGED, job.log.read_text()
    assert job.log.read_text().count("from step 0 to") == 4  # the beginning is a place to go back to
    assert "1 step was skipped, up to step 1" in job.last_word()["message"]


def test_a_lost_loss_costs_one_step(job):
    job.finish(seams=[("lose_loss_of_step", 3)])
    assert any("step 3 changed nothing, for its loss was nan" in text for text in job.last_word()["warnings"])
    lines = job.metrics()
    assert [line["step"] for line in lines if line["loss"] is None] == [3]


@pytest.mark.parametrize("function", ["prepare", "resume", "deliver"])
def test_sigterm_before_and_after_the_steps_ends_at_once(job, function):
    assert job.attempt(seams=[("terminate_during", function)]) == ExitCode.YIELDED, job.log.read_text()
    assert job.last_word()["exitCode"] == ExitCode.YIELDED
    job.finish()
    assert job.last_word().get("resumedFromStep", 0) == (STEPS if function == "deliver" else 0)


def test_sigterm_from_outside(job):
    """The signal comes while a step hangs: what is left is the end of the grace period."""
    job.run = {"gracePeriodSeconds": 2}
    pid = job.trainers.start(job.environ(), log=job.log, seams=[("hang_before_step", 3)])
    wait_until(lambda: "step 2/6" in (job.log.read_text() if job.log.exists() else ""), describe="step 2", timeout=60)
    os.kill(pid, signal.SIGTERM)
    assert job.trainers.wait() == ExitCode.YIELDED, job.log.read_text()
    assert job.last_word()["step"] == 2


@pytest.mark.parametrize("seam", [("hang_before_step", 3), ("hang_during", "deliver")])
def test_a_hang_is_noticed_and_shown(job, seam):
    job.run = {"stallSeconds": 3}
    assert job.attempt(seams=[seam]) == ExitCode.HANG, job.log.read_text()
    assert "stallSeconds" in job.last_word()["message"]
    assert "in wait" in job.log.read_text()  # the stack of the thread that hangs
    job.run = {}
    job.finish()


def test_a_newer_attempt_fences_an_older_one(job):
    """The older one comes back to life after its successor has begun."""
    older = job.environ()
    job.finish()
    receipt = job.output / names.checkpoint_prefix(UID) / "output.json"
    receipt.unlink()  # or there would be nothing left to be fenced off from
    job.trainers.start(older, log=job.log)
    assert job.trainers.wait() == ExitCode.FENCED
    word = json.loads((job.root / "attempt-1" / "last-word.json").read_text())
    assert word["exitCode"] == ExitCode.FENCED


def test_progress_and_metrics_while_it_runs(job, tmp_path):
    job.finish(seams=[("look_before_step", [5, str(tmp_path / "seen.json")])])
    progress, metrics, health = json.loads((tmp_path / "seen.json").read_text())
    report = ProgressReport.model_validate_json(progress)
    assert (report.attempt, report.stage) == (1, "Running")
    assert report.progress.step == 4
    assert report.progress.total_steps == STEPS
    assert report.progress.loss > 0
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values["diffusion_trainer_step"]) == 4
    assert float(values["diffusion_trainer_total_steps"]) == STEPS
    assert float(values["diffusion_trainer_samples_total"]) == 16
    assert float(values["diffusion_trainer_step_duration_seconds_count"]) == 4
    assert float(values["diffusion_trainer_nonfinite_loss_total"]) == 0
    assert health == "ok\n"


@pytest.mark.parametrize(
    "training",
    [
        {"deterministic": True, "gradientCheckpointing": "Always"},
        {"mixedPrecision": "BF16", "optimizer": {"maxGradNorm": None}},
        {"maxSteps": ..., "epochs": 2, "objective": {"snrGamma": None}, "lrSchedule": {"name": "Constant"}},
        {"microBatchSize": 3, "lrSchedule": {"name": "WarmupStableDecay"}, "seed": 7},
    ],
)
def test_options_train(job, training):
    job.overrides = {"training": training, "checkpoint": {"interval": "10m", "resume": "Never"}}
    job.finish()
    assert job.last_word()["progress"]["loss"] > 0


def test_recomputing_activations_changes_nothing(job, tmp_path_factory):
    """gradientCheckpointing gives the same gradients, bit for bit on the CPU."""
    other = TrainerJob(tmp_path_factory.mktemp("other"), job.inputs, job.trainers)
    other.overrides = {"training": {"gradientCheckpointing": "Always"}}
    job.finish()
    other.finish()
    assert (job.output / names.METRICS_FILE).read_bytes() == (other.output / names.METRICS_FILE).read_bytes()


def test_never_resuming_starts_over(job):
    job.overrides = {"checkpoint": {"interval": "2steps", "resume": "Never"}}
    assert job.attempt(failpoint="step:5:kill") == -signal.SIGKILL
    job.finish()
    assert "resumedFromStep" not in job.last_word()
    lines = (job.output / names.METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_another_base_model_is_never_resumed_on(job, tmp_path):
    inputs = tmp_path / "inputs"
    make_tiny_sd1(inputs / "model")
    make_image_folder(inputs / "data", 8)
    job.inputs = inputs
    assert job.attempt(failpoint="step:5:kill") == -signal.SIGKILL
    (inputs / "model").rename(inputs / "gone")
    make_tiny_sd1(inputs / "model", seed=1)
    assert job.attempt() == ExitCode.BAD_DATA, job.log.read_text()
    assert "model.source" in job.last_word()["message"]


def test_killed_and_resumed_on_s3(job, inputs, tmp_path):
    """Model, dataset, credentials and results where pods have them: in buckets and a Secret's folder."""
    with S3Server(buckets=["team"]) as server:
        keys = server.credentials
        secret = tmp_path / "secret"
        secret.mkdir()
        (secret / "AWS_ACCESS_KEY_ID").write_text(keys.access_key_id)
        (secret / "AWS_SECRET_ACCESS_KEY").write_text(keys.secret_access_key)
        (secret / "AWS_REGION").write_text(keys.region)
        (secret / "AWS_ENDPOINT_URL").write_text(keys.endpoint_url)
        credentials = Credentials.from_folder(secret)
        for name in ("model", "data"):
            store = open_store(f"s3://team/{name}/", credentials=credentials)
            for path in (path for path in (inputs / name).rglob("*") if path.is_file()):
                store.put_file(path.relative_to(inputs / name).as_posix(), path)
        job.environment = {names.ENV_CREDENTIALS_DIR: str(secret)}
        job.overrides = {
            "model": {"source": "s3://team/model/"},
            "dataset": job.spec()["dataset"] | {"source": "s3://team/data/"},
            "output": {"destination": "s3://team/results/", "formats": ["Diffusers"]},
            "credentials": {"secretRef": {"name": "team-s3"}},
        }
        assert job.attempt(failpoint="step:5:kill", workers=2) == -signal.SIGKILL, job.log.read_text()
        job.finish(workers=2)
        word = LastWord.model_validate(job.last_word())
        assert word.resumed_from_step in {2, 4}
        assert word.latest_checkpoint.uri.startswith(f"s3://team/results/{names.checkpoint_prefix(UID)}ckpt/")
        results = open_store("s3://team/results/", credentials=credentials)
        assert len(results.get(names.METRICS_FILE).splitlines()) == STEPS
        assert results.head(word.output[0].name).size == word.output[0].bytes
        assert keys.secret_access_key not in job.log.read_text() + json.dumps(job.last_word())


def test_help_needs_no_torch():
    script = "import sys; sys.argv = ['x', '--help']; from diffusion_trainer.__main__ import main\n"
    script += "try: main()\nfinally: assert 'torch' not in sys.modules, 'torch was imported'"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "DIFFUSION_RUN_FILE" in ran.stdout
    assert "75" in ran.stdout
