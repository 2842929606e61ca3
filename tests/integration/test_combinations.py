"""The API server says of a job's combinations what `diffusion_api` says, in one sentence each."""

import itertools
import re

import pytest
import yaml

from diffusion_api import combinations
from diffusion_api.job import JobSpec
from testkit.builders import make_job
from testkit.controlplane import ControlPlane
from testkit.kube import KubectlError
from testkit.operating import ROOT

pytestmark = pytest.mark.apiserver

SECTIONS = {
    "DreamBooth": {"dreamBooth": {"instancePrompt": "a photo of sks dog", "classPrompt": "a dog"}},
    "TextualInversion": {"textualInversion": {"token": "<a>", "initializerToken": "a"}},
}
WHOLE = {"dreamBooth": {"instancePrompt": "a", "classPrompt": "b", "adapter": "None"}}


def cases():
    for method, family in itertools.product(combinations.FAMILIES, (*combinations.TEXT_TO_IMAGE, "UNet2D", "Auto")):
        yield {"method": method, "model": {"family": family}, **SECTIONS.get(method, {})}
    for method, form in itertools.product(combinations.FAMILIES, ("Kohya", "SingleFile")):
        yield {"method": method, "output": {"formats": [form]}, **SECTIONS.get(method, {})}
        if method == "DreamBooth":
            yield {"method": method, "output": {"formats": [form]}, **WHOLE}
    for method, family in itertools.product(("LoRA", "FineTune"), ("SD1", "SD3")):
        yield {"method": method, "model": {"family": family, "textEncoder": {"train": True}}}
    for part in ("Attention", "CrossAttention"):
        yield {"method": "FineTune", "model": {"family": "SD3"}, "fineTune": {"parts": part}}
    for family, fields in itertools.product(
        ("SD1", "SD3", "Auto"), ({"predictionType": "Flow"}, {"predictionType": "Sample"}, {"shift": 2})
    ):
        yield {"method": "LoRA", "model": {"family": family}, "training": {"objective": fields}}
    for family, predicted in itertools.product(("SD1", "SD3", "Auto"), ("Auto", "Epsilon", "VPrediction", "Flow")):
        fields = {"predictionType": predicted, "zeroTerminalSNR": True}
        yield {"method": "LoRA", "model": {"family": family}, "training": {"objective": fields}}
    yield {"method": "LoRA", "training": {"objective": {"predictionType": "Epsilon", "zeroTerminalSNR": False}}}
    yield {"method": "Unconditional", "model": {"family": "UNet2D", "vae": "s3://models/vae/"}}
    for method, family in (("Unconditional", "UNet2D"), ("LoRA", "SD3")):
        yield {"method": method, "model": {"family": family, "textEncoder": {"source": "s3://models/sd3/"}}}
    for method, images, prompts, fraction in itertools.product(
        ("LoRA", "Unconditional"), (0, 1, 2), ([], [{"prompt": "a cat"}]), (0, 0.1)
    ):
        scores = {"model": "s3://models/clip/", "images": images}
        held_out = {"source": "s3://team-a/cats/", "validation": {"fraction": fraction}}
        yield {"method": method, "dataset": held_out, "validation": {"prompts": prompts, "scores": scores}}
    yield {"method": "DreamBooth", "lora": {"rank": 4}, **WHOLE}
    yield from unread()


def unread():
    """What a method does not read, and values that ask for nothing."""
    for family, gamma in itertools.product(("SD1", "SD3", "Auto"), (None, 3, 5)):
        yield {"method": "LoRA", "model": {"family": family}, "training": {"objective": {"snrGamma": gamma}}}
    folder = {"source": "s3://team-a/cats/"}
    for method, captions in itertools.product(
        ("Unconditional", "DreamBooth", "LoRA"),
        ({"default": "x"}, {"prefix": "x"}, {"dropout": 0}, {"dropout": 0.2}, {"shuffleTags": True}),
    ):
        yield {"method": method, "dataset": folder | {"captions": captions}, **SECTIONS.get(method, {})}
    for method, more in itertools.product(
        ("Unconditional", "DreamBooth", "FineTune"),
        ({}, {"prompt": "x"}, {"captionDropout": 0.3}, {"captionDropout": 0}),
    ):
        yield {
            "method": method,
            "dataset": {"source": None, "concepts": [folder, folder | more]},
            **SECTIONS.get(method, {}),
        }
    for method, more in itertools.product(
        ("Unconditional", "LoRA"), ({}, {"negativePrompt": "x"}, {"guidanceScale": 5}, {"guidanceScale": 1})
    ):
        yield {"method": method, "validation": {"prompts": [{"prompt": "a"}, {"prompt": "b"} | more]}}
    for method, decay, trains in itertools.product(("TextualInversion", "LoRA"), (0, 0.01, 0.1), (False, True)):
        sections = {"training": {"optimizer": {"weightDecay": decay}}, "model": {"textEncoder": {"train": trains}}}
        yield {"method": method, **sections, **SECTIONS.get(method, {})}


def said_by_python(spec):
    """Return the sentence of the contract's Python half, None where it accepts a spec."""
    try:
        JobSpec.model_validate(spec)
    except ValueError as error:
        return re.search(r"Value error, (.+?) \[type=", str(error), re.DOTALL)[1]
    return None


def test_cel_and_python_agree():
    jobs = {f"case-{i}": make_job(name=f"case-{i}", namespace="default", **spec) for i, spec in enumerate(cases())}
    with ControlPlane() as plane:
        kube = plane.kube
        crd = ROOT / "crds" / "diffusiontrainingjobs.yaml"
        kube.kubectl("apply", "--server-side", "-f", crd)
        kube.wait_established(yaml.safe_load(crd.read_text())["metadata"]["name"])
        for job in jobs.values():
            for field in ("uid", "creationTimestamp", "generation", "resourceVersion"):
                job["metadata"].pop(field, None)
            job.pop("status", None)
        with pytest.raises(KubectlError) as caught:
            kube.kubectl("create", "--dry-run=server", "-f", "-", input=yaml.safe_dump_all(jobs.values()))
    said = str(caught.value).split('DiffusionTrainingJob.diffusion-operator.io "')[1:]
    refused = {text.partition('"')[0]: text for text in said}
    for name, job in jobs.items():
        sentence = said_by_python(job["spec"])
        assert (sentence is not None) == (name in refused), (job["spec"], sentence, refused.get(name))
        if sentence is not None:
            assert sentence in " ".join(refused[name].split()), (job["spec"], sentence)
    assert 15 < len(refused) < len(jobs) - 15
