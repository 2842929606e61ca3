"""What an evaluation looks at."""

from types import SimpleNamespace

import pytest

from diffusion_api.job import TrainerSpec
from diffusion_trainer import evaluation
from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.evaluation import Evaluator
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
