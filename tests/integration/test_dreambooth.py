"""DreamBooth as a real run: class images are drawn when they are missing and used again by the next attempt."""

from diffusion_api import names
from diffusion_trainer.data import DatasetLock
from diffusion_trainer.objectstore import open_store
from testkit.attempts import UID, TrainerJob
from testkit.tiny import make_image_folder, make_tiny_sd1


def state(job):
    store = open_store(f"file://{job.output}/{names.checkpoint_prefix(UID)}")
    keys = [info.key for info in store.list("class")]
    return {key: store.get(key) for key in keys}


def test_class_images_are_drawn_once_and_trained_on_by_every_attempt(trainers, tmp_path):
    make_tiny_sd1(tmp_path / "model")
    make_image_folder(tmp_path / "data", 3, captions="None")
    job = TrainerJob(tmp_path, tmp_path, trainers)
    dataset = job.spec()["dataset"] | {"validation": {"fraction": 0}}
    job.overrides = {
        "method": "DreamBooth",
        "dreamBooth": {"instancePrompt": "a sks", "classPrompt": "a thing", "classImages": 2},
        "dataset": dataset,
        "training": {"maxSteps": 3, "batchSize": 2},
        "checkpoint": {"interval": "1steps"},
    }
    assert job.attempt(failpoint="step:2:kill") == -9
    assert "drew 2 class images, 0 were there" in job.log.read_text()
    drawn = state(job)
    assert sorted(drawn) == ["class-images/00000.png", "class-images/00001.png", "class.lock.json"]
    job.finish()
    assert state(job) == drawn
    assert "drew" not in job.log.read_text()
    lock = DatasetLock.from_json(drawn["class.lock.json"])
    assert [(one.caption, one.role, one.bucket) for one in lock.images] == [("a thing", "class", (64, 64))] * 2
    lines = job.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3]
    # The prior's mean is added to the instance images': around 1 each at the start, where noise is not yet known.
    assert 1.5 < lines[0]["loss"] < 3.5
