"""What goes together: every method with every family and every format, as a table."""

import itertools

import pytest

from diffusion_api import combinations
from diffusion_api.job import TrainerSpec

SECTIONS = {
    "DreamBooth": {"dreamBooth": {"instancePrompt": "a photo of sks dog", "classPrompt": "a dog"}},
    "TextualInversion": {"textualInversion": {"token": "<a>", "initializerToken": "a"}},
}
METHODS = tuple(combinations.FAMILIES)
FAMILIES = (*combinations.TEXT_TO_IMAGE, "UNet2D")


def spec(method, *, formats=("Diffusers",), family="Auto", **sections):
    content = {
        "method": method,
        "model": {"source": "s3://m/x/", "family": family},
        "dataset": {"source": "s3://d/x/"},
        "output": {"destination": "s3://o/x/", "formats": list(formats)},
        **SECTIONS.get(method, {}),
    }
    return TrainerSpec.model_validate(content | sections)


@pytest.mark.parametrize(("method", "family"), list(itertools.product(METHODS, FAMILIES)))
def test_families(method, family):
    """Words for pictures with words, UNet2D without; a new word would need a file for T5, too."""
    fits = (method == "Unconditional") == (family == "UNet2D") and (method, family) != ("TextualInversion", "SD3")
    if fits:
        assert spec(method, family=family)
        return
    with pytest.raises(ValueError, match=f"method {method} cannot train family {family}: .*use"):
        spec(method, family=family)


@pytest.mark.parametrize(
    ("method", "sections", "kind", "formats"),
    [
        ("LoRA", {}, "Adapter", {"Diffusers", "Kohya", "SingleFile"}),
        ("DreamBooth", {}, "Adapter", {"Diffusers", "Kohya", "SingleFile"}),
        (
            "DreamBooth",
            {"dreamBooth": {"instancePrompt": "a", "classPrompt": "b", "adapter": "None"}},
            "Weights",
            {"Diffusers", "SingleFile"},
        ),
        ("FineTune", {}, "Weights", {"Diffusers", "SingleFile"}),
        ("FromScratch", {}, "Weights", {"Diffusers", "SingleFile"}),
        ("Unconditional", {}, "Weights", {"Diffusers"}),
        ("TextualInversion", {}, "Embedding", {"Diffusers", "Kohya"}),
    ],
)
def test_formats(method, sections, kind, formats):
    assert spec(method, **sections).trains == kind
    for name in ("Diffusers", "Kohya", "SingleFile"):
        if name in formats:
            assert spec(method, formats=[name], **sections)
        else:
            with pytest.raises(ValueError, match=f"output.formats: {name}: .*use"):
                spec(method, formats=[name], **sections)


@pytest.mark.parametrize(
    ("family", "sections", "message"),
    [
        ("SD3", {"fineTune": {"parts": "CrossAttention"}}, "fineTune.parts: family SD3 has joint attention"),
    ],
)
def test_parts_that_a_family_has_not(family, sections, message):
    model = {"source": "s3://m/x/", "family": family} | sections.get("model", {})
    with pytest.raises(ValueError, match=message):
        spec("FineTune", **(sections | {"model": model}))
    assert spec("FineTune", **(sections | {"model": model | {"family": "SDXL"}}))


def objective(**fields):
    return {"training": {"objective": fields}}


@pytest.mark.parametrize(
    ("family", "sections", "message"),
    [
        ("SD3", objective(predictionType="Epsilon"), "predictionType: family SD3 is a flow and stays one: use Auto"),
        ("SD1", objective(predictionType="Flow"), "predictionType: only family SD3 is a flow: use Auto"),
        ("SDXL", objective(shift=3), "training.objective.shift: only family SD3, which is a flow, has a shift: leave"),
    ],
)
def test_objectives_that_a_family_has_not(family, sections, message):
    with pytest.raises(ValueError, match=message):
        spec("LoRA", family=family, **sections)
    other = "SD1" if family == "SD3" else "SD3"
    assert spec("LoRA", family=other, **sections)
    assert [value for _, value, _ in spec("LoRA", **sections).misfits(family)] == [
        *sections["training"]["objective"].values()
    ]


def test_an_unconditional_model_has_no_vae():
    model = {"source": "s3://m/x/", "vae": "s3://m/v/"}
    with pytest.raises(ValueError, match=r"model.vae: family UNet2D works on pixels and has no VAE: leave it out"):
        spec("Unconditional", model=model | {"family": "UNet2D"})
    assert spec("LoRA", model=model | {"family": "SDXL"})


@pytest.mark.parametrize("family", combinations.TEXT_TO_IMAGE)
@pytest.mark.parametrize("method", ["LoRA", "DreamBooth", "FineTune"])
def test_text_encoders_of_every_family_with_text_can_learn(method, family):
    assert spec(method, model={"source": "s3://m/x/", "family": family, "textEncoder": {"train": True}})


def test_an_unconditional_model_has_no_text_encoder():
    model = {"source": "s3://m/x/", "textEncoder": {"source": "s3://m/t/"}}
    with pytest.raises(ValueError, match=r"model.textEncoder.source: family UNet2D has no text encoder: leave it out"):
        spec("Unconditional", model=model | {"family": "UNet2D"})
    assert [path for path, _, _ in spec("Unconditional", model=model).misfits("UNet2D")] == ["model.textEncoder.source"]
    assert spec("LoRA", model=model | {"family": "SD3"})


def test_an_adapters_section_without_an_adapter():
    with pytest.raises(ValueError, match=r"lora: dreamBooth.adapter is None"):
        spec("DreamBooth", dreamBooth={"instancePrompt": "a", "adapter": "None", "classPrompt": "b"}, lora={"rank": 4})


def test_a_whole_denoiser_learns_dreambooth_slowly():
    booth = {"instancePrompt": "a", "classPrompt": "b"}
    assert spec("DreamBooth", dreamBooth=booth).learning_rate == 1e-4
    assert spec("DreamBooth", dreamBooth=booth | {"adapter": "None"}).learning_rate == 5e-6
