"""What the story of a run decides by itself."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from diffusion_api.job import TrainerSpec
from diffusion_trainer.peers import Peers
from diffusion_trainer.train import Work, close

SPEC = {
    "method": "LoRA",
    "model": {"source": "file:///model/"},
    "dataset": {"source": "file:///data/"},
    "output": {"destination": "file:///out/"},
}


@pytest.mark.parametrize(
    ("interval", "steps"),
    [("Auto", [0, 10, 20, 25]), ("10m", [0, 10, 20, 25]), ("4steps", [0, 4, 8, 10, 12, 16, 20, 24, 25])],
)
def test_who_waits_for_an_upload_of_the_leader_waits_outside_of_collectives(interval, steps):
    """An evaluation may pin its weights, and a checkpoint every few steps is never left out: both wait for the last."""
    sections = {"validation": {"everySteps": 10}, "checkpoint": {"interval": interval}}
    run = SimpleNamespace(spec=TrainerSpec.model_validate(SPEC | sections))
    said = []

    class Leads(Peers):
        @contextmanager
        def leader_first(self, name):
            yield
            said.append(name)

    work = Work(run, None, Leads(), None, None, None)
    for step in range(26):
        close(SimpleNamespace(close=said.append), step, work, total=25)
    assert [one for one in said if isinstance(one, int)] == list(range(26))
    assert [name for name in said if isinstance(name, str)] == [f"books/{step}" for step in steps]
    assert all(said.index(f"books/{step}") == said.index(step) + 1 for step in steps)  # told when it is done
