"""The wire: what is written is what is read, and nothing is longer than its carrier."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion_api.outcomes import OF_CAUSE, OF_CODE, OUTCOMES, Cause, ExitCode
from diffusion_api.run import MAX_LAST_WORD_BYTES, JobIdentity, LastWord, RunConfig
from diffusion_api.status import OutputFile
from diffusion_api.validate import parse
from testkit.builders import make_job

JOB = make_job()


def test_a_run_config_survives_the_annotation():
    run = RunConfig(
        job=JobIdentity(name="cats", namespace="a", uid="u"), attempt=2, device="CPU", spec=parse(JOB).trainer_part()
    )
    assert RunConfig.model_validate_json(run.model_dump_json(by_alias=True)) == run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"nodes": 2}, "2 nodes need a rendezvous"),
        ({"nodeRank": 1}, "nodeRank is 1 of 1 nodes"),
    ],
)
def test_pods_that_cannot_meet_are_refused(run, message):
    identity = {"name": "cats", "namespace": "a", "uid": "u"}
    base = {"job": identity, "attempt": 1, "device": "CPU", "spec": parse(JOB).trainer_part()}
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(base | run)


@given(st.text(max_size=1024), st.text(max_size=20_000), st.integers(0, 8))
def test_a_last_word_fits_into_a_termination_message(message, lines, files):
    output = tuple(OutputFile(name="n" * 250, sha256="0" * 64, bytes=1) for _ in range(files))
    word = LastWord(attempt=1, exit_code=1, message=message, last_lines=lines, output=output)
    text = word.to_message()
    assert len(text.encode()) <= MAX_LAST_WORD_BYTES
    assert LastWord.model_validate_json(text).exit_code == 1


def test_outcomes_cover_every_code_and_cause_once():
    assert set(OF_CODE) == set(ExitCode)
    assert set(OF_CAUSE) == set(Cause)
    assert len(OUTCOMES) == len(Cause)
    assert all(code == 0 or not (1 <= code <= 2 or 126 <= code <= 165) for code in OF_CODE)
