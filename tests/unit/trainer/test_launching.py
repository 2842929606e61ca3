"""What a pod with several training processes says of its end: whose words count, and what is said for the silent."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from diffusion_api.run import LastWord, RunConfig
from diffusion_api.status import LatestCheckpoint
from diffusion_trainer import launching
from diffusion_trainer.endings import Ending, root_cause
from diffusion_trainer.errors import PeerLost
from diffusion_trainer.launching import LEAVING_SECONDS, adopt, word_file, words_of
from diffusion_trainer.peers import Peers, digest
from diffusion_trainer.progress import Board

LATER = 1_000_000.0  # what a process without a word is known to have ended at


def run(device="CPU", **more):
    spec = {
        "method": "LoRA",
        "model": {"source": "file:///model/"},
        "dataset": {"source": "file:///data/"},
        "output": {"destination": "file:///out/"},
    }
    job = {"name": "a", "namespace": "b", "uid": "c"}
    return RunConfig.model_validate({"job": job, "attempt": 1, "device": device, "spec": spec, **more})


@pytest.mark.parametrize(
    ("codes", "root"),
    [
        ([81, 80], 80),
        ([80, 81], 80),
        ([81, 81], 81),
        ([75, 81, 83], 83),
        ([75, 81], 81),
        ([75, 75], 75),
        ([0, 0], 0),
        ([0, 75], 75),
        ([84, 81, 81], 84),
        ([1, 70], 1),  # the earliest of those that explain
        ([70, 1], 70),
        ([81, 137, 75], 137),
    ],
)
def test_the_root_cause_is_the_end_that_explains_the_others(codes, root):
    assert root_cause([Ending(code, "") for code in codes]).code == root


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "words").mkdir()
    return SimpleNamespace(work=tmp_path)


def say(settings, local_rank, code, *, at=0.0, **more):
    word = LastWord(attempt=1, exit_code=code, message=f"{code} of {local_rank}", **more)
    path = word_file(settings.work, local_rank)
    path.write_text(word.to_message())
    os.utime(path, (at, at))


def children(settings, codes, *, at=LATER):
    """Return what the parent knows of processes that ended one second after another, local rank 0 first."""
    found = launching._Children()
    for local_rank, code in enumerate(codes):
        pid = 100 + local_rank
        word_file(settings.work, local_rank).with_suffix(".pid").write_text(str(pid))
        found.seen[pid] = SimpleNamespace(exitcode=code)
        found.ended_at[pid] = at + local_rank
    return found


def ending(settings, codes, *, config=None, errors=(), at=LATER):
    return launching._ending(config or run(), settings, children(settings, codes, at=at), errors=errors)


def test_words_are_told_in_the_order_in_which_they_were_said(settings):
    say(settings, 0, 70, at=20)
    say(settings, 1, 80, at=10, last_lines="one\ntwo")
    found = ending(settings, [70, 80])
    assert (found.code, found.message, found.lines) == (80, "80 of 1", ("one", "two"))


def test_who_was_killed_is_named_by_its_rank(settings):
    say(settings, 0, 81)
    config = run(nodes=3, nodeRank=2, processesPerNode=2, rendezvous={"host": "h", "port": 1})
    found = ending(settings, [81, -signal.SIGKILL], config=config)
    assert found.code == 137
    assert "training process 5 was ended by SIGKILL" in found.message


def test_who_was_killed_by_the_launcher_is_no_cause(settings):
    say(settings, 0, 81)
    found = children(settings, [81, -signal.SIGKILL])
    found.ended_at[101] = LATER + LEAVING_SECONDS
    assert launching._ending(run(), settings, found, errors=()).code == 81


@pytest.mark.parametrize(
    ("code", "device", "expected"),
    [
        (-signal.SIGTERM, "CPU", 75),
        (-signal.SIGSEGV, "CPU", 139),
        (-signal.SIGABRT, "CPU", 134),
        (-signal.SIGABRT, "CUDA", 81),  # NCCL's watchdog
        (3, "CPU", 3),
    ],
)
def test_what_is_said_for_the_silent(settings, code, device, expected):
    assert ending(settings, [code], config=run(device)).code == expected


def test_a_last_word_that_was_cut_off_is_none(settings):
    word_file(settings.work, 0).write_text('{"attempt": 1, "exit')
    say(settings, 1, 81)
    assert list(words_of(settings.work)) == [1]


def test_pods_that_did_not_meet(settings):
    assert ending(settings, [], errors=[PeerLost("nobody came")]).code == 81
    assert ending(settings, []).code == 1


def test_the_pods_board_is_that_of_its_first_process(settings):
    board = Board(attempt=1)
    latest = LatestCheckpoint(step=4, uri="file:///c/", time="2026-01-02T03:04:05Z")
    say(settings, 1, 75, step=5, warnings=("b",))
    say(settings, 0, 75, step=5, latest_checkpoint=latest, warnings=("a",))
    adopt(board, words_of(settings.work))
    assert (board.state.step, board.state.latest_checkpoint, board.state.warnings) == (5, latest, ("a", "b"))
    adopt(board, {})
    assert board.state.step == 5


def test_one_process_decides_alone():
    peers = Peers()
    assert (peers.leads, peers.part, peers.agree(wish=True), peers.gather("x", [1])) == (
        True,
        slice(0, None, 1),
        True,
        [1],
    )
    with peers.leader_first("x"), peers.node_leader_first("y"):
        assert peers.as_leader_says("z", 3) == 3


def test_a_digest_tells_any_bit_and_any_name():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    assert digest(one) == digest(dict(reversed(one.items())))
    changed = [{"a": torch.tensor([1.0, 2.0000002]), "b": one["b"]}, {"c": one["a"], "b": one["b"]}]
    assert len({digest(one), *map(digest, changed)}) == 3


SMI = """#!/bin/sh
case "$1" in
  *count,name*) echo "2, {card}"; echo "2, {card}" ;;
  *driver_version*) echo "{driver}"; echo "{driver}" ;;
esac
"""


@pytest.mark.parametrize(
    ("card", "driver", "spared"),
    [
        ("NVIDIA GeForce RTX 4090", "535.183.01", True),
        ("NVIDIA GeForce RTX 4090", "570.86.15", False),
        ("NVIDIA A100-SXM4-80GB", "535.183.01", False),
    ],
)
def test_cards_whose_transfers_hang_are_spared_them(tmp_path, monkeypatch, card, driver, spared):
    (tmp_path / "nvidia-smi").write_text(SMI.format(card=card, driver=driver))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environ = {"NCCL_IB_DISABLE": "0"}
    launching.spare_peer_to_peer(environ)
    assert environ == {"NCCL_IB_DISABLE": "0", **({"NCCL_P2P_DISABLE": "1"} if spared else {})}
