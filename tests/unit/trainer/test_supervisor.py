"""The supervisor's parts without a trainer: settings, stopping, the watchdog's verdict, endings and the last word."""

import json
import os
import signal

import pytest

from diffusion_api.outcomes import OF_CODE, ExitCode
from diffusion_api.run import MAX_LAST_WORD_BYTES, LastWord
from diffusion_trainer import errors
from diffusion_trainer.endings import ending_of, last_word
from diffusion_trainer.errors import BadConfig, BadData, Diverged, Fenced, TrainerError, UploaderDied
from diffusion_trainer.progress import Board
from diffusion_trainer.settings import LONGEST_SCRATCH, Failpoint, read_settings, settle
from diffusion_trainer.stopping import StopSignal, Yielded
from diffusion_trainer.supervisor import Watchdog, read_run


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


# --- settings ---


def test_the_paths_of_a_pod_are_the_defaults():
    settings = read_settings({})
    assert str(settings.run_file) == "/etc/diffusion/run.json"
    assert str(settings.work) == "/workspace"
    assert str(settings.termination_log) == "/dev/termination-log"
    assert settings.metrics_port == 9100
    assert settings.loader_workers >= 1
    assert settings.failpoint == Failpoint("", -1)


def test_everything_can_be_set():
    environ = {
        "DIFFUSION_RUN_FILE": "/a", "DIFFUSION_CREDENTIALS_DIR": "/b", "DIFFUSION_WORK_DIR": "/c",
        "DIFFUSION_TERMINATION_LOG": "/d", "DIFFUSION_METRICS_PORT": "0", "DIFFUSION_LOADER_WORKERS": "0",
        "DIFFUSION_FAILPOINT": "step:3:kill",
    }  # fmt: skip
    settings = read_settings(environ)
    paths = (settings.run_file, settings.credentials, settings.work, settings.termination_log)
    assert [str(path) for path in paths] == ["/a", "/b", "/c", "/d"]
    assert (settings.metrics_port, settings.loader_workers, settings.failpoint) == (0, 0, Failpoint("step", 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DIFFUSION_METRICS_PORT", "http"),
        ("DIFFUSION_LOADER_WORKERS", "-1"),
        ("DIFFUSION_FAILPOINT", "step:3:explode"),
        ("DIFFUSION_FAILPOINT", "moon:3:kill"),
        ("DIFFUSION_FAILPOINT", "step:3:kill:last"),
        ("DIFFUSION_FAILPOINT", "step"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        read_settings({name: value})


def test_a_failpoint_hits_its_point_only(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    for point, number in [("step", 2), ("checkpoint", 3), ("step", 3)]:
        Failpoint("step", 3).hit(point, number)
        Failpoint("", -1).hit(point, number)
    assert killed == [(os.getpid(), signal.SIGKILL)]


def test_a_failpoint_is_of_one_process():
    failpoint = read_settings({"DIFFUSION_FAILPOINT": "step:3:kill:2"}).failpoint
    assert failpoint == Failpoint("step", 3, rank=2)
    assert [failpoint.of(rank).number for rank in range(4)] == [-1, -1, 3, -1]


def test_scratch_space_lies_below_the_work_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("diffusion_trainer.settings.LONGEST_SCRATCH", len(str(tmp_path)) + 50)
    environ = {"HOME": "/nowhere"}
    settle(environ, work=tmp_path, deterministic=True)
    assert {"HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= {
        name for name, value in environ.items() if value.startswith(str(tmp_path))
    }
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_a_users_own_home_and_a_short_folder_for_sockets_are_kept(tmp_path, monkeypatch):
    """Found by the exactness test: with a long TMPDIR, loader workers waited for each other for ever."""
    monkeypatch.setattr("tempfile.tempdir", None)
    deep = tmp_path / ("x" * LONGEST_SCRATCH)
    environ = {"HOME": str(tmp_path), "TMPDIR": "/tmp"}
    settle(environ, work=deep, deterministic=False)
    assert environ["TMPDIR"] == "/tmp"
    assert environ["HOME"] == str(tmp_path)
    assert "CUBLAS_WORKSPACE_CONFIG" not in environ


# --- stopping ---


def test_between_steps_a_stop_is_a_flag():
    clock = Clock()
    stop = StopSignal(grace_seconds=30, monotonic=clock)
    assert not stop.requested
    assert stop.seconds_left == 30
    stop.request()
    clock.now += 12
    stop.request()  # a second SIGTERM does not prolong anything
    assert stop.requested
    assert stop.seconds_left == 18
    clock.now += 100
    assert stop.seconds_left == 0


def test_in_a_section_that_may_be_cut_short_it_is_an_exception_once():
    stop = StopSignal(grace_seconds=30)
    with pytest.raises(Yielded), stop.cut_short():
        stop.request()
    stop.request()


def test_a_section_is_not_even_begun_after_a_stop():
    stop = StopSignal(grace_seconds=30)
    stop.request()
    with pytest.raises(Yielded), stop.cut_short():
        pytest.fail("begun")


def test_after_a_section_a_stop_is_a_flag_again():
    stop = StopSignal(grace_seconds=30)
    with stop.cut_short(), stop.cut_short():
        pass
    stop.request()
    assert stop.requested


def test_recovery_from_failures_does_not_swallow_a_stop():
    assert not issubclass(Yielded, Exception)


# --- the watchdog ---


def _watchdog(*, stall=60, grace=100):
    clock = Clock()
    board = Board(attempt=1, monotonic=clock)
    stop = StopSignal(grace_seconds=grace, monotonic=clock)
    return clock, board, stop, Watchdog(board, stop, stall_seconds=stall, leave=pytest.fail, monotonic=clock)


def test_silence_is_a_hang():
    clock, board, _, watchdog = _watchdog()
    board.say("encoding images 3/400")
    clock.now += 60
    assert watchdog.verdict() is None
    clock.now += 1
    ending = watchdog.verdict()
    assert ending.code == ExitCode.HANG
    assert "encoding images 3/400" in ending.message
    assert "runPolicy.stallSeconds" in ending.message


def test_every_update_is_a_sign_of_life_but_a_warning_is_none():
    clock, board, _, watchdog = _watchdog()
    clock.now += 50
    board.update(step=3)
    clock.now += 50
    board.warn("the storage is slow")
    assert watchdog.verdict() is None
    clock.now += 11
    assert watchdog.verdict().code == ExitCode.HANG


def test_the_grace_period_ends_before_the_kubelet_ends_it():
    clock, _, stop, watchdog = _watchdog(grace=100)
    stop.request()
    clock.now += 89
    assert watchdog.verdict() is None
    clock.now += 1
    assert watchdog.verdict().code == ExitCode.YIELDED


# --- endings ---


def _classes(base):
    return [c for child in base.__subclasses__() for c in (child, *_classes(child))]


@pytest.mark.parametrize(
    "kind", [c for c in _classes(TrainerError) if c.exit_code is not None], ids=lambda c: c.__name__
)
def test_every_error_ends_with_a_code_that_the_operator_knows(kind):
    ending = ending_of(kind("field: value; remedy"))
    assert ending.code == kind.exit_code
    assert ending.code in OF_CODE
    assert ending.message == "field: value; remedy"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (Yielded(), 75),
        (BadConfig("x"), 64),
        (BadData("x"), 65),
        (errors.NotFound("x"), 66),
        (errors.BucketMissing("x"), 66),
        (errors.StorageUnavailable("x"), 69),
        (Diverged("x"), 70),
        (errors.PermissionDenied("x"), 77),
        (errors.GpuOutOfMemory("x"), 80),
        (errors.GpuFault("x"), 82),
        (Fenced("x"), 84),
        (errors.SpecChanged("x"), 64),
        (errors.CheckpointCorrupt("x"), 65),
        (UploaderDied("x"), 1),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(error, code):
    assert ending_of(error).code == code


def test_a_crash_shows_its_traceback():
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 // 0
    ending = ending_of(caught.value)
    assert ending.message == "ZeroDivisionError: integer division or modulo by zero"
    assert ending.lines[-1] == "ZeroDivisionError: integer division or modulo by zero"
    assert any("test_supervisor" in line for line in ending.lines)


def test_the_last_word_fits_and_keeps_what_matters():
    board = Board(attempt=3)
    board.update(step=7)
    for number in range(8):
        board.warn(f"{number} " + "w" * 300)
    text = last_word(ending_of(BadConfig("m" * 5000)), board, log_lines=['ü"\n' * 300] * 20)
    assert len(text.encode()) <= MAX_LAST_WORD_BYTES
    word = LastWord.model_validate_json(text)
    assert (word.attempt, word.exit_code, word.step, len(word.message)) == (3, 64, 7, 1024)


def test_output_is_named_by_a_run_that_is_done_only():
    from diffusion_api.status import OutputFile

    board = Board(attempt=1)
    board.update(output=(OutputFile(name="a", sha256="b", bytes=1),))
    assert json.loads(last_word(ending_of(None), board, log_lines=()))["output"]
    board.update(micro_batch_size=6)
    assert json.loads(last_word(ending_of(None), board, log_lines=()))["microBatchSize"] == 6
    assert json.loads(last_word(ending_of(Yielded()), board, log_lines=()))["output"] == []


# --- the run file ---


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(BadConfig, match=r"nothing\.json"):
        read_run(tmp_path / "nothing.json")


def test_an_unknown_field_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"attempt": 1, "surprise": true}')
    with pytest.raises(BadConfig, match="release"):
        read_run(tmp_path / "run.json")
