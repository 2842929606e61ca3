"""Every message names field, value and remedy."""

import copy

import pytest

from diffusion_api.validate import InvalidJobError, parse
from testkit.builders import make_job

JOB = make_job()


def job(path, value):
    made = copy.deepcopy(JOB)
    *sections, last = path.split(".")
    node = made["spec"]
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    return made


def test_the_minimal_job_is_valid_and_gets_the_methods_defaults():
    spec = parse(JOB)
    assert (spec.batch_size, spec.learning_rate, spec.total_steps(7)) == (4, 1e-4, 2000)


def test_epochs_count_batches():
    assert parse(job("training.epochs", 3)).total_steps(7) == 21


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lora.rnak", 8, "spec.lora.rnak: 8: unknown field, did you mean rank?"),
        ("training.learningrate", 1, "spec.training.learningrate: 1: unknown field, did you mean learningRate?"),
        ("lora.rank", 0, "spec.lora.rank: 0: input should be greater than or equal to 1"),
        ("lora.rank", "x", "spec.lora.rank: x: input should be a valid integer"),
        ("training", {"maxSteps": 3, "epochs": 4}, "set only one of training.maxSteps and training.epochs"),
        ("dataset", {}, "set exactly one of dataset.source and dataset.concepts"),
        ("dreamBooth", {"instancePrompt": "a"}, "dreamBooth does not belong to method LoRA"),
        ("model.source", "ftp://x/yyyy", "spec.model.source: ftp://x/yyyy: not supported yet: use s3://"),
        ("model.vae", "gs://x/vae/", "spec.model.vae: gs://x/vae/: not supported yet: use s3://"),
        (
            "model.textEncoder",
            {"source": "gs://x/text/"},
            "spec.model.textEncoder.source: gs://x/text/: not supported yet: use s3://",
        ),
        ("dataset.source", "file:///tmp/x", "spec.dataset.source: file:///tmp/x: not supported yet: use s3://"),
        (
            "dataset",
            {"concepts": [{"source": "s3://a/b/"}, {"source": "file:///x/y/"}]},
            "spec.dataset.concepts[1].source: file:///x/y/: not supported yet: use s3://",
        ),
        ("model.source", "s3://models/sd.ckpt", "not supported yet: convert it to one .safetensors file"),
        ("training.compile", "Always", "spec.training.compile: Always: not supported yet: use Auto or Never"),
        (
            "resources",
            {"profile": "a", "nodes": 3, "gpusPerNode": 2},
            "spec.training.batchSize: 4: use a multiple of 6, so that all GPUs",
        ),
        ("output.hub", {"repository": "a/b"}, "not supported yet: leave it out"),
        ("training.microBatchSize", 0, "spec.training.microBatchSize: 0: input should be greater than or equal to 1"),
        (
            "training.microBatchSize",
            "many",
            "unable to parse string as an integer or 'Auto'",
        ),
        ("checkpoint.keepLast", 1, "spec.checkpoint.keepLast: 1: input should be greater than or equal to 2"),
        ("model.family", "UNet2D", "method LoRA cannot train family UNet2D"),
    ],
)
def test_bad_values_are_named(path, value, message):
    with pytest.raises(InvalidJobError) as caught:
        parse(job(path, value))
    assert message in str(caught.value)


def test_all_problems_are_told_at_once():
    made = job("lora", {"rank": 0, "alpha": -1})
    with pytest.raises(InvalidJobError) as caught:
        parse(made)
    assert [p.path for p in caught.value.problems] == ["spec.lora.rank", "spec.lora.alpha"]


def test_names_that_cannot_be_host_names():
    made = copy.deepcopy(JOB) | {"metadata": {"name": "a" * 51}}
    with pytest.raises(InvalidJobError, match="at most 50 characters"):
        parse(made)


def test_names_of_jobs_on_several_nodes_begin_with_a_letter():
    made = job("resources.nodes", 2) | {"metadata": {"name": "3d-cats"}}
    with pytest.raises(InvalidJobError, match="begin with a letter"):
        parse(made)
    assert parse(job("resources.gpusPerNode", 2) | {"metadata": {"name": "3d-cats"}})


def test_local_mode_reads_folders():
    assert parse(job("dataset.source", "file:///data/cats"), local=True)


def test_identity_ignores_what_does_not_decide_the_weights():
    base = parse(JOB).identity()
    assert parse(job("checkpoint.interval", "5steps")).identity() == base
    assert parse(job("training.microBatchSize", 2)).identity() == base
    assert parse(job("training.seed", 7)).identity() != base


def test_the_identity_of_a_job_outlives_an_upgrade():
    """Where this fails, jobs that run while the operator is upgraded cannot resume.

    A new field belongs here only when it is unset by default; a changed default that changes the weights may fail it.
    """
    assert parse(JOB).identity() == "ad8f7d0400a3ce4e8ed56a5b1a10ec518ad751a3fd84d612c1d1db75a5a017a5"
    assert parse(job("model.vae", None)).identity() == parse(JOB).identity()
    assert parse(job("model.vae", "s3://models/vae/")).identity() != parse(JOB).identity()


def test_the_identity_of_a_job_with_concepts_outlives_an_upgrade():
    made = job("dataset", {"concepts": [{"source": "s3://a/b/", "prompt": "a dog"}, {"source": "s3://a/c/"}]})
    identity = parse(made).identity()
    assert identity == "91f222bff737711477e2e5cfb806a9e3bfbd8a7457c11541bf70a08978fb5c29"
    made["spec"]["dataset"]["concepts"][1]["captionDropout"] = None
    assert parse(made).identity() == identity
    made["spec"]["dataset"]["concepts"][1]["captionDropout"] = 0.05
    assert parse(made).identity() != identity


def test_the_identity_counts_the_images_measured_only_where_they_decide_when_to_stop():
    assert parse(job("validation.maxImages", 7)).identity() == parse(JOB).identity()
    stops, seven = ({"earlyStopping": {}} | more for more in ({}, {"maxImages": 7}))
    assert parse(job("validation", stops)).identity() != parse(job("validation", seven)).identity()
    assert parse(job("validation", stops)).identity() == (
        "675a17c02dcc6243270c7ce8fe481cc360980344640b15720bcbc9df2b92f9dd"
    )


def dreambooth(batch_size=4, **booth):
    made = job("method", "DreamBooth")
    made["spec"].pop("lora", None)
    made["spec"]["dreamBooth"] = {"instancePrompt": "a photo of sks dog", **booth}
    made["spec"].setdefault("training", {})["batchSize"] = batch_size
    return made


def test_dreambooth_needs_what_describes_its_class():
    with pytest.raises(InvalidJobError, match=r"priorLossWeight is above 0, so classPrompt .* are needed"):
        parse(dreambooth())
    with pytest.raises(InvalidJobError, match="classImages"):
        parse(dreambooth(classPrompt="a photo of a dog", classImages=0))
    assert parse(dreambooth(priorLossWeight=0)).dream_booth.preserves_prior is False
    assert parse(dreambooth(classPrompt="a photo of a dog")).dream_booth.preserves_prior is True


def test_half_of_a_batch_are_class_images():
    with pytest.raises(InvalidJobError, match=r"training.batchSize is odd, but half of each batch are class images"):
        parse(dreambooth(3, classPrompt="a photo of a dog"))
    assert parse(dreambooth(3, priorLossWeight=0)).batch_size == 3


def test_early_stopping_needs_something_to_go_by():
    made = job("validation", {"earlyStopping": {}})
    assert parse(made).validation.early_stopping.patience == 4
    made["spec"]["dataset"]["validation"] = {"fraction": 0}
    with pytest.raises(InvalidJobError, match=r"earlyStopping goes by held-out images, but .*fraction is 0"):
        parse(made)


@pytest.mark.parametrize(
    ("scores", "changes", "message"),
    [
        ({"images": 1}, {}, r"scores.images is 1, and KID compares sets of at least 2: use 64, or 0"),
        ({"images": 2049}, {}, r"spec.validation.scores.images: 2049: .*less than or equal to 2048"),
        ({"images": 8}, {"fraction": 0}, r"compares with held-out images, but dataset.validation.fraction is 0: use"),
        ({}, {"prompts": []}, r"scores: there are no pictures to score: add validation.prompts, or set images"),
        ({}, {"method": "Unconditional"}, r"draws without words, so that there is no CLIP score: set images"),
        ({"model": "gs://a/clip/"}, {}, r"spec.validation.scores.model: gs://a/clip/: not supported yet: use s3://"),
        ({"model": "a/clip"}, {}, r"spec.validation.scores.model: a/clip"),
    ],
)
def test_scores_need_something_to_score(scores, changes, message):
    def made(scores, *, prompts=({"prompt": "a cat"},), fraction=0.05, method="LoRA"):
        made = job("validation", {"prompts": list(prompts), "scores": {"model": "s3://models/clip/"} | scores})
        made["spec"]["dataset"]["validation"] = {"fraction": fraction}
        made["spec"]["method"] = method
        if method == "Unconditional":
            made["spec"].pop("lora", None)
            made["spec"]["output"]["formats"] = ["Diffusers"]
        return made

    with pytest.raises(InvalidJobError, match=message):
        parse(made(scores, **changes))
    assert parse(made({"images": 2}, prompts=())).validation.scores.images == 2
    assert parse(made({}, fraction=0)).validation.scores.images == 0
    assert parse(made({"images": 8}, method="Unconditional")).validation.draws
    assert parse(made({})).identity() == parse(job("validation", {})).identity()
