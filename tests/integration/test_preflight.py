"""The trainer's preflight on folders and on a real S3 server: each fault has its exit code and one clear message."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import boto3
import pytest

from diffusion_api import names
from diffusion_api.outcomes import ExitCode
from diffusion_api.run import LastWord, RunConfig
from diffusion_trainer.endings import ending_of
from diffusion_trainer.errors import TrainerError
from diffusion_trainer.preflight import preflight
from diffusion_trainer.progress import Board
from diffusion_trainer.settings import read_settings
from testkit.objectstore import MemoryStore, Objects
from testkit.s3 import S3Server, refused_endpoint
from testkit.tiny import make_image_folder, make_tiny_clip, make_tiny_sd1

# What the process has loaded when it ends.
RUN_AND_LIST = """
import runpy, sys
sys.argv = ["diffusion_trainer", "--preflight"]
try:
    runpy.run_module("diffusion_trainer", run_name="__main__")
except SystemExit as end:
    print("heavy:", sorted({"torch", "diffusers", "transformers", "peft"} & set(sys.modules)))
    sys.exit(end.code)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_tiny_sd1(root / "model")
    make_tiny_clip(root / "clip")
    make_image_folder(root / "data", 12)
    return root


@pytest.fixture(scope="module")
def s3(inputs):
    with S3Server(buckets=("models", "team", "locked")) as server:
        client = client_of(server.credentials)
        for bucket, folder in (("models", inputs / "model"), ("team", inputs / "data")):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    client.upload_file(str(path), bucket, f"{folder.name}/{path.relative_to(folder)}")
        reader = server.add_user("reader", "reader-secret")
        for bucket in ("models", "team", "locked"):
            client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(reading(bucket)))
        yield server, reader


def client_of(credentials):
    return boto3.client(
        "s3",
        endpoint_url=credentials.endpoint_url,
        aws_access_key_id=credentials.access_key_id,
        aws_secret_access_key=credentials.secret_access_key,
        region_name=credentials.region,
    )


def reading(bucket):
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    allowed = {"Effect": "Allow", "Principal": {"AWS": ["reader"]}, "Action": ["s3:GetObject", "s3:ListBucket"]}
    return {"Version": "2012-10-17", "Statement": [allowed | {"Resource": resources}]}


class Job:
    """A run of its own, on folders unless told otherwise."""

    def __init__(self, work: Path, inputs: Path) -> None:
        self.work = work
        self.inputs = inputs
        self.environ = {names.ENV_WORK_DIR: str(work / "work"), names.ENV_RUN_FILE: str(work / "run.json")}
        self.environ[names.ENV_TERMINATION_LOG] = str(work / "last-word")
        self.spec = {
            "method": "LoRA",
            "model": {"source": f"file://{inputs}/model/"},
            "dataset": {"source": f"file://{inputs}/data/", "filters": {"minSide": 32}},
            "output": {"destination": f"file://{work}/out/"},
        }

    def copied(self, name: str) -> Path:
        """Return a copy of an input that the job reads from now on, to be spoilt."""
        folder = self.work / name
        shutil.copytree(self.inputs / name, folder)
        self.spec["model" if name == "model" else "dataset"]["source"] = f"file://{folder}/"
        return folder

    def with_scores(self, folder: Path) -> None:
        self.spec["validation"] = {"prompts": [{"prompt": "a thing"}], "scores": {"model": f"file://{folder}/"}}

    def on_s3(self, credentials) -> None:
        folder = self.work / "secret"
        folder.mkdir()
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            (folder / key).write_text(credentials.environment[key])
        self.environ[names.ENV_CREDENTIALS_DIR] = str(folder)
        self.spec["credentials"] = {"secretRef": {"name": "any"}, "endpointUrl": credentials.endpoint_url}
        self.spec["model"]["source"] = "s3://models/model/"
        self.spec["dataset"]["source"] = "s3://team/data/"
        self.spec["output"]["destination"] = "s3://team/out/"

    @property
    def run(self) -> RunConfig:
        identity = {"name": "cats", "namespace": "team", "uid": "uid-1"}
        return RunConfig.model_validate({"job": identity, "attempt": 1, "device": "CPU", "spec": self.spec})

    def check(self):
        """Return the ending and the board, as the supervisor has them."""
        board = Board(attempt=0)
        try:
            return preflight(self.run, read_settings(self.environ), board=board), board
        except TrainerError as error:
            return ending_of(error), board

    def process(self):
        (self.work / "run.json").write_text(self.run.model_dump_json(by_alias=True))
        done = subprocess.run(
            [sys.executable, "-c", RUN_AND_LIST],
            env=os.environ | self.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, LastWord.model_validate_json((self.work / "last-word").read_text())


@pytest.fixture
def job(tmp_path, inputs):
    return Job(tmp_path, inputs)


def assert_ends(job, code, *texts):
    ending, board = job.check()
    assert ending.code == code, ending.message
    assert not [text for text in texts if text not in ending.message], ending.message
    return ending, board


class TestProcess:
    def test_a_good_job_ends_with_a_report_and_without_torch(self, job):
        job.with_scores(job.inputs / "clip")
        done, word = job.process()
        assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
        assert "heavy: []" in done.stdout
        assert (word.attempt, word.exit_code) == (0, ExitCode.DONE)
        found = word.preflight
        assert (found.family, found.architecture, found.images, found.sampled, found.complete) == (
            "SD1",
            None,
            12,
            8,
            True,
        )
        assert found.bytes == sum(p.stat().st_size for p in (job.inputs / "data").glob("*") if p.suffix != ".txt")
        left = [path for path in (job.work / "out").rglob("[!.]*") if path.is_file()]
        assert left == [], "the probe is deleted again"

    def test_a_bad_one_with_exit_code_and_message(self, job):
        job.spec["dataset"]["source"] = f"file://{job.work}/nothing/"
        done, word = job.process()
        assert done.returncode == word.exit_code == ExitCode.INPUT_MISSING
        assert "dataset.source" in word.message
        assert "has no images" in word.message
        assert word.preflight.family == "SD1", "what was found out is told all the same"


class TestFolders:
    def test_no_image_can_be_decoded(self, job):
        folder = job.work / "data"
        folder.mkdir()
        (folder / "a.png").write_bytes(b"no image")
        (folder / "a.txt").write_text("a caption")
        job.spec["dataset"]["source"] = f"file://{folder}/"
        assert_ends(job, ExitCode.BAD_DATA, "1 of 1 images cannot be read", "a.png", "no JPEG, PNG or WebP image")

    def test_one_bad_image_within_the_bound_is_a_warning(self, job):
        folder = job.copied("data")
        (folder / "000.png").write_bytes(b"no image")
        job.spec["dataset"]["filters"]["maxBadFraction"] = 0.1
        _, board = assert_ends(job, ExitCode.DONE, "preflight passed")
        assert "1 of 8 sampled images would be left out (000.png: " in board.state.warnings[0]
        job.spec["dataset"]["filters"]["maxBadFraction"] = 0.05
        assert_ends(job, ExitCode.BAD_DATA, "1 of 12 images cannot be read")

    def test_captions_are_missing(self, job):
        folder = job.copied("data")
        (folder / "001.txt").unlink()  # of a file that is not in the sample
        assert_ends(job, ExitCode.BAD_DATA, "1 of 12 images have no caption", "001.jpg", "dataset.captions.default")
        job.spec["dataset"]["captions"] = {"default": "a thing"}
        assert_ends(job, ExitCode.DONE)

    def test_an_empty_caption_is_none(self, job):
        (job.copied("data") / "000.txt").write_text(" \n")
        assert_ends(job, ExitCode.BAD_DATA, "1 of 12 images have no caption", "000.png")

    def test_a_table_names_what_is_not_there(self, job):
        folder = job.copied("data")
        (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}\n')
        assert_ends(job, ExitCode.BAD_DATA, "names 1 images that are not there", "gone.png")

    def test_every_image_is_too_small(self, job):
        del job.spec["dataset"]["filters"]
        _, board = assert_ends(job, ExitCode.DONE)
        assert "8 of 8 sampled images would be left out" in board.state.warnings[0]

    def test_the_model_is_missing(self, job):
        job.spec["model"]["source"] = f"file://{job.work}/nothing/"
        assert_ends(job, ExitCode.INPUT_MISSING, "model.source", "has no model_index.json")

    def test_the_weights_are_pickled(self, job):
        weights = job.copied("model") / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        assert_ends(job, ExitCode.INPUT_MISSING, "unet/diffusion_pytorch_model.safetensors is missing")

    @pytest.mark.parametrize("name", ["pipeline.py", "unet/helper.pyc"])
    def test_the_model_brings_code(self, job, name):
        (job.copied("model") / name).write_text("raise SystemExit")
        assert_ends(job, ExitCode.BAD_DATA, "model.source", name, "code of models is never run")

    def test_the_model_names_a_class_that_is_not_allowed(self, job):
        index = job.copied("model") / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["os", "system"]}))
        assert_ends(job, ExitCode.BAD_DATA, "os.system", "UNet2DConditionModel")

    def test_what_scores_pictures_is_no_clip_model(self, job):
        job.with_scores(job.inputs / "model" / "text_encoder")
        assert_ends(job, ExitCode.INPUT_MISSING, "validation.scores.model", "has no preprocessor_config.json")

    def test_another_family_was_asked_for(self, job):
        job.spec["model"]["family"] = "SDXL"
        assert_ends(job, ExitCode.BAD_DATA, "model.family is SDXL", "is SD1")

    def test_training_from_scratch_needs_no_weights_of_the_denoiser(self, job):
        (job.copied("model") / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        assert_ends(job, ExitCode.INPUT_MISSING, "unet/diffusion_pytorch_model.safetensors is missing")
        job.spec["method"] = "FromScratch"
        assert_ends(job, ExitCode.DONE, "preflight passed")

    def test_the_method_cannot_train_the_models_family(self, job):
        """What the API server finds where the family is written down, the preflight finds where it is Auto."""
        job.spec["method"] = "Unconditional"
        assert_ends(
            job, ExitCode.BAD_CONFIG, "method: method Unconditional cannot train family SD1: it draws from text: use"
        )

    @pytest.mark.skipif(os.geteuid() != 0, reason="a read-only mount is made with root's rights")
    def test_the_destination_cannot_be_written(self, job):
        out = job.work / "out"
        out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", out], check=True)
        try:
            assert_ends(job, ExitCode.NO_PERMISSION, "output.destination", "Read-only file system")
        finally:
            subprocess.run(["umount", out], check=True)

    def test_two_findings_are_both_told(self, job):
        job.spec["model"]["source"] = f"file://{job.work}/nothing/"
        (job.copied("data") / "000.txt").unlink()
        assert_ends(job, ExitCode.INPUT_MISSING, "has no model_index.json", "moreover: dataset.source", "no caption")


class TestS3:
    def test_a_good_job(self, s3, job):
        server, _ = s3
        job.on_s3(server.credentials)
        assert_ends(job, ExitCode.DONE, "12 images", "8 decoded", "destination writable")
        listed = client_of(server.credentials).list_objects_v2(Bucket="team", Prefix="out/")
        assert listed["KeyCount"] == 0

    def test_a_bucket_is_missing(self, s3, job):
        job.on_s3(s3[0].credentials)
        job.spec["dataset"]["source"] = "s3://nowhere/data/"
        assert_ends(job, ExitCode.INPUT_MISSING, "dataset.source", "s3://nowhere/", "create the bucket")

    def test_the_destinations_bucket_is_missing(self, s3, job):
        job.on_s3(s3[0].credentials)
        job.spec["output"]["destination"] = "s3://nowhere/out/"
        assert_ends(job, ExitCode.INPUT_MISSING, "output.destination", "s3://nowhere/", "create the bucket")

    def test_the_key_is_wrong(self, s3, job):
        job.on_s3(replace(s3[0].credentials, secret_access_key="wrong"))
        assert_ends(job, ExitCode.NO_PERMISSION, "credentials.secretRef")

    def test_the_secret_lacks_a_key(self, s3, job):
        job.on_s3(s3[0].credentials)
        (job.work / "secret" / "AWS_SECRET_ACCESS_KEY").unlink()
        assert_ends(job, ExitCode.NO_PERMISSION, "has no AWS_SECRET_ACCESS_KEY", "credentials.secretRef")

    def test_the_user_may_read_but_not_write(self, s3, job):
        _, reader = s3
        job.on_s3(reader)
        ending, board = assert_ends(job, ExitCode.NO_PERMISSION, "output.destination", "AccessDenied")
        assert board.state.preflight.images == 12, "reading is allowed"
        assert "moreover" not in ending.message

    def test_the_folder_is_empty(self, s3, job):
        job.on_s3(s3[0].credentials)
        job.spec["dataset"]["source"] = "s3://team/empty/"
        assert_ends(job, ExitCode.INPUT_MISSING, "dataset.source s3://team/empty/ has no images")

    def test_a_store_that_does_not_answer_is_tried_again_but_a_users_error_is_final(self, s3, job):
        with refused_endpoint() as nobody:
            job.on_s3(replace(s3[0].credentials, endpoint_url=nobody))
            assert_ends(job, ExitCode.STORAGE_UNAVAILABLE, "output.destination", "check that the store is up")
            job.spec["model"]["source"] = f"file://{job.work}/nothing/"
            assert_ends(job, ExitCode.INPUT_MISSING, "model.source", "moreover: output.destination")


def test_a_store_that_ignores_conditions_is_refused():
    from diffusion_trainer.errors import BadConfig
    from diffusion_trainer.preflight import probe

    with pytest.raises(BadConfig, match="ignores conditional writes"):
        probe(MemoryStore(Objects(), conditional=False))
