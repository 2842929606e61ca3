"""What an evaluation looks at."""

from types import SimpleNamespace

import pytest

from diffusion_api.job import TrainerSpec
from diffusion_trainer import evaluation
from diffusion_trainer.curves import Curves, Evaluation
from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.evaluation import Evaluator
from diffusion_trainer.peers import Peers
from diffusion_trainer.validation import measured

PLACE = "file:///nowhere"


class SeenError(Exception):
    """What the loss is measured of: enough is known."""


def evaluator(**validation):
    spec = TrainerSpec.model_validate(
        {
            "method": "LoRA",
            "model": {"source": PLACE},
            "dataset": {"source": PLACE},
            "validation": validation,
            "output": {"destination": PLACE},
        }
    )
    images = tuple(
        LockedImage(f"{i:064x}", f"{i}", 64, 64, "c", (64, 64), "train" if i % 2 else "validation") for i in range(100)
    )
    nothing = dict.fromkeys(Evaluator.__dataclass_fields__)
    known = {"family": SimpleNamespace(device="cpu"), "peers": SimpleNamespace(part=slice(None))}
    known |= {"curves": Curves(), "total_steps": 8}
    return Evaluator(**nothing | known | {"spec": spec, "lock": DatasetLock(images, {}, {})})


@pytest.mark.parametrize(("asked", "images"), [({}, 16), ({"maxImages": 20}, 20), ({"maxImages": 1000}, 50)])
def test_the_job_says_how_many_images_are_measured(monkeypatch, asked, images):
    def look(lock, *_, **how):
        raise SeenError(measured(lock, most=how["most"]), how["beside"])

    monkeypatch.setattr(evaluation, "validate", look)
    with pytest.raises(SeenError) as seen:
        evaluator(**asked)._evaluate(1)
    held_out, beside = seen.value.args
    assert (len(held_out), len(beside)) == (images, images)


@pytest.mark.parametrize(("steps", "stopped"), [((2, 4), None), ((2, 4, 6), 6), ((2, 4, 8), None)])
def test_a_run_that_took_all_its_steps_was_not_stopped(steps, stopped):
    evaluating = evaluator(everySteps=2, earlyStopping={"patience": 2})
    for step in steps:
        evaluating.curves.evaluate(step, Evaluation(step, 1.0))
    assert evaluating.stopped_after == stopped
    assert evaluating.stops_early == (stopped is not None)


def test_steps_without_an_evaluation_do_not_search_the_lock():
    class Large(DatasetLock):
        @property
        def held_out(self):
            raise SeenError

    evaluating = evaluator(everySteps=3)
    object.__setattr__(evaluating, "lock", Large((), {}, {}))
    assert [evaluating.due(step) for step in (0, 1, 2)] == [False] * 3
    with pytest.raises(SeenError):
        evaluating.due(3)


def test_training_images_are_ranked_once(monkeypatch):
    ranked = []
    monkeypatch.setattr(evaluation, "train_subset", lambda *_, **__: ranked.append(1) or (1,))
    monkeypatch.setattr(evaluation, "validate", lambda *_, **__: None)
    evaluating = evaluator()
    object.__setattr__(evaluating, "peers", Peers())
    evaluating._evaluate(1)
    evaluating._evaluate(2)
    assert len(ranked) == 1
