"""Exports of what is more than an adapter on the denoiser: magnitudes, text encoders, whole models, new words.

Loaded again by diffusers, or by the rules of the programs they are for, written down here a second time.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion_api.job import TrainerSpec
from diffusion_trainer.export import export_diffusers, export_kohya, export_single_file, writer_of
from diffusion_trainer.methods import attach
from diffusion_trainer.models import open_model
from testkit.tiny import make_tiny_sd1

CAPTIONS = ["a b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sd1(tmp_path_factory.mktemp("tiny") / "model")


def spec(folder, method="LoRA", **sections):
    uri = folder.as_uri()
    content = {"method": method, "dataset": {"source": uri}, "output": {"destination": uri}, **sections}
    return TrainerSpec.model_validate(content | {"model": {"source": uri} | content.get("model", {})})


def trained(job, folder, scale=0.3):
    """Return a family in which everything that is trained has moved."""
    family = open_model(folder, job, device="cpu", dtype=torch.float32)
    attached = attach(family, job, seed=1)
    attached.train(mode=False)
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in attached.parameters.items():
        moved = 1 if ".lora_B." in name else scale * parameter.detach().abs().mean()
        parameter.data += torch.randn(parameter.shape, generator=numbers) * 0.3 * moved
    return family, attached


def predicted(unet):
    numbers = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 77, 32, generator=numbers)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), text).sample


def spoken(pipe, captions=CAPTIONS):
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(tokens.input_ids).last_hidden_state


def pipeline(folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def same(found, wanted, tolerance=1e-4):
    assert (found - wanted).abs().max() < tolerance


DORA = {"lora": {"rank": 4, "alpha": 2, "useDora": True}, "model": {"textEncoder": {"train": True}}}
PLAIN = {"lora": {"rank": 4, "alpha": 2}, "model": {"textEncoder": {"train": True}}}


@pytest.mark.parametrize("sections", [PLAIN, DORA], ids=["plain", "magnitudes"])
def test_adapters_with_text_loaded_by_a_pipeline(folder, tmp_path, sections):
    job = spec(folder, **sections)
    family, attached = trained(job, folder)
    export_diffusers(attached.parameters, family, job, folder=tmp_path)
    pipe, base = pipeline(folder), pipeline(folder)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", local_files_only=True)
    same(predicted(pipe.unet), predicted(family.denoiser))
    same(spoken(pipe), attached.text.encode(CAPTIONS)["text"])
    assert (spoken(pipe) - spoken(base)).abs().max() > 1e-2


def by_kohyas_names(pipe):
    """Return the modules of a pipeline by the names that sd-scripts gives them."""
    names = {"lora_unet_" + n.replace(".", "_"): m for n, m in pipe.unet.named_modules()}
    return names | {"lora_te_text_model_" + n.replace(".", "_"): m for n, m in pipe.text_encoder.named_modules()}


def merge_as_comfyui_does(path, pipe):
    """comfy/weight_adapter: W + up @ down * alpha / rank; then rows of the length dora_scale [out, 1] says."""
    modules, tensors = by_kohyas_names(pipe), load_file(path)
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        down, up = tensors[key], tensors[f"{name}.lora_up.weight"]
        weight = modules[name].weight.data
        weight += tensors[f"{name}.alpha"].item() / down.shape[0] * (up @ down)
        if f"{name}.dora_scale" in tensors:
            scale = tensors[f"{name}.dora_scale"]
            assert scale.shape == (len(weight), 1)
            weight *= scale / weight.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("sections", [PLAIN, DORA], ids=["plain", "magnitudes"])
def test_the_kohya_file_merged_by_hand(folder, tmp_path, sections):
    job = spec(folder, **sections)
    family, attached = trained(job, folder)
    (path,) = export_kohya(attached.parameters, family, job, folder=tmp_path)
    pipe = pipeline(folder)
    merge_as_comfyui_does(path, pipe)
    same(predicted(pipe.unet), predicted(family.denoiser), 1e-3)
    same(spoken(pipe), attached.text.encode(CAPTIONS)["text"], 1e-3)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    dora = job.lora.use_dora
    assert metadata["ss_network_module"] == ("lycoris.kohya" if dora else "networks.lora")
    assert ("dora_wd" in json.loads(metadata["ss_network_args"])) == dora
    assert metadata["ss_text_encoder_lr"] == "5e-06"


def test_the_kohya_file_with_text_loaded_by_a_pipeline(folder, tmp_path):
    job = spec(folder, **PLAIN)
    family, attached = trained(job, folder)
    export_kohya(attached.parameters, family, job, folder=tmp_path)
    pipe = pipeline(folder)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", local_files_only=True)
    same(predicted(pipe.unet), predicted(family.denoiser))
    same(spoken(pipe), attached.text.encode(CAPTIONS)["text"])


WHOLE = {"FineTune": {"model": {"textEncoder": {"train": True}}}, "FromScratch": {}}


@pytest.mark.parametrize(("method", "sections"), [("LoRA", DORA), ("FineTune", WHOLE["FineTune"]), ("FromScratch", {})])
def test_the_single_file_is_the_model_that_was_trained(folder, tmp_path, method, sections):
    from diffusers.loaders import single_file_utils

    job = spec(folder, method, **sections)
    family, attached = trained(job, folder)
    (path,) = export_single_file(attached.parameters, family, job, folder=tmp_path)
    content, pipe = load_file(path), pipeline(folder)
    pipe.unet.load_state_dict(single_file_utils.convert_ldm_unet_checkpoint(dict(content), pipe.unet.config))
    text = {n.removeprefix("text_model."): t for n, t in single_file_utils.convert_ldm_clip_checkpoint(content).items()}
    pipe.text_encoder.load_state_dict({n: t for n, t in text.items() if not n.endswith("position_ids")})
    same(predicted(pipe.unet), predicted(family.denoiser))
    same(spoken(pipe), attached.text.encode(CAPTIONS)["text"])


@pytest.mark.parametrize(
    ("method", "sections", "changed"),
    [
        ("FineTune", WHOLE["FineTune"], {"unet", "text_encoder"}),
        ("FineTune", {"fineTune": {"parts": "Attention"}}, {"unet"}),
        ("FromScratch", {}, {"unet"}),
    ],
)
def test_the_folder_is_the_model_that_was_trained(folder, tmp_path, method, sections, changed):
    job = spec(folder, method, **sections)
    family, attached = trained(job, folder)
    _, write = writer_of(job.trains, "Diffusers")
    files = write(attached.parameters, family, job, folder=tmp_path)
    pipe = pipeline(tmp_path)
    same(predicted(pipe.unet), predicted(family.denoiser), 1e-5)
    same(spoken(pipe), attached.text.encode(CAPTIONS)["text"], 1e-5)
    relative = {str(path.relative_to(tmp_path)) for path in files}
    assert relative == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    differing = {name for name in relative if (tmp_path / name).read_bytes() != (folder / name).read_bytes()}
    assert {name.split("/")[0] for name in differing} == changed
    assert all(name.endswith(".safetensors") for name in differing)


def test_the_scheduler_says_what_was_trained(folder, tmp_path):
    """A model that has learned v would draw noise as the base's epsilon."""
    job = spec(folder, "FineTune", training={"objective": {"predictionType": "VPrediction"}})
    family, attached = trained(job, folder)
    _, write = writer_of(job.trains, "Diffusers")
    write(attached.parameters, family, job, folder=tmp_path)
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    before = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert config == before | {"prediction_type": "v_prediction"}


@pytest.mark.parametrize("wanted", ["Diffusers", "Kohya"])
def test_a_word_loaded_by_a_pipeline(folder, tmp_path, wanted):
    word = {"token": "<it>", "initializerToken": "a", "vectors": 2}
    job = spec(folder, "TextualInversion", textualInversion=word)
    family, attached = trained(job, folder, scale=3)
    _, write = writer_of(job.trains, wanted)
    (path,) = write(attached.parameters, family, job, folder=tmp_path)
    assert path.name == {"Diffusers": "learned_embeds.safetensors", "Kohya": "it.safetensors"}[wanted]
    assert set(load_file(path)) == {{"Diffusers": "<it>", "Kohya": "emb_params"}[wanted]}
    pipe, base = pipeline(folder), pipeline(folder)
    pipe.load_textual_inversion(tmp_path, weight_name=path.name, token="<it>", local_files_only=True)
    captions = ["a <it> b"]
    ours = attached.text.encode(captions)["text"]
    same(spoken(pipe, pipe.maybe_convert_prompt(captions, pipe.tokenizer)), ours, 1e-5)
    assert (spoken(base, ["a a a b"]) - ours).abs().max() > 1e-2  # the vectors have moved from where they began
