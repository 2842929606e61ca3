"""Waiting ends with what was awaited, or says what was seen instead."""

from __future__ import annotations

import pytest

from testkit.kube import condition
from testkit.process import flags
from testkit.waiting import wait_until


def test_it_returns_the_first_true_answer():
    answers = iter([None, 0, "", "there"])
    assert wait_until(lambda: next(answers), describe="it", interval=0) == "there"


def test_it_says_what_was_seen_last():
    with pytest.raises(TimeoutError, match=r"waited 0 s for the moon; last seen: \[\]\nit is new"):
        wait_until(list, describe="the moon", timeout=0, detail=lambda: "it is new")


def test_a_probe_that_raises_ends_it():
    def probe() -> bool:
        raise LookupError("gone for good")

    with pytest.raises(LookupError, match="gone for good"):
        wait_until(probe, describe="it")


def test_flags_are_spelt_as_go_wants_them():
    assert flags({"v": 2, "leader-elect": False, "name": "x"}) == ["--v=2", "--leader-elect=false", "--name=x"]


def test_a_condition_that_is_absent_is_empty():
    assert condition({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}, "Ready")["status"] == "True"
    assert condition({}, "Ready") == {}
