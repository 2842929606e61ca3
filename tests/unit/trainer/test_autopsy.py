"""The log of a failed attempt: bounded, whole lines, and never in the way."""

import logging
import threading
from pathlib import Path

import pytest

from diffusion_api import names
from diffusion_api.run import RunConfig
from diffusion_trainer import autopsy
from diffusion_trainer.autopsy import Recorder, keep_log


def make_run(destination: str, *, attempt: int = 1) -> RunConfig:
    job = {"name": "cats", "namespace": "team-a", "uid": "u-1"}
    spec = {
        "method": "LoRA",
        "model": {"source": "file:///model/"},
        "dataset": {"source": "file:///data/"},
        "output": {"destination": destination},
    }
    return RunConfig.model_validate({"job": job, "attempt": attempt, "device": "CPU", "spec": spec})


def record(recorder: Recorder, message: str) -> None:
    recorder.emit(logging.LogRecord("x", logging.INFO, __file__, 1, message, (), None))


def test_the_end_of_the_log_is_kept_in_whole_lines() -> None:
    recorder = Recorder(max_bytes=20)
    for number in range(1000):
        record(recorder, f"line {number}")
    assert recorder.content() == b"line 998\nline 999\n"


def test_a_line_that_is_longer_than_all_that_may_be_kept_is_cut() -> None:
    recorder = Recorder(max_bytes=8)
    record(recorder, "0123456789")
    assert recorder.content() == b"0123456\n"


def test_it_is_put_below_the_destination(tmp_path: Path) -> None:
    run = make_run(f"file://{tmp_path}/out", attempt=3)
    where = keep_log(run, b"what happened\n", rank=5, credentials=tmp_path)
    folder = names.attempt_logs(run.job.uid, 3)
    assert where == f"file://{tmp_path}/out/{folder}"
    assert (tmp_path / "out" / folder / "rank-5.log").read_bytes() == b"what happened\n"


def test_a_store_that_refuses_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "out").write_text("a file where a folder is needed")
    run = make_run(f"file://{tmp_path}/out")
    assert keep_log(run, b"lines", rank=0, credentials=tmp_path) is None
    assert "could not be put into the bucket" in caplog.text


def test_a_store_that_hangs_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    monkeypatch.setattr(autopsy, "open_store", lambda *_args, **_more: release.wait())
    run = make_run(f"file://{tmp_path}/out")
    try:
        assert keep_log(run, b"lines", rank=0, credentials=tmp_path, patience_seconds=0.01) is None
        assert "within" in caplog.text
    finally:
        release.set()
