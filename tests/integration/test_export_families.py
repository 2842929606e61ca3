"""Exports of the families with several text encoders or another denoiser, read by diffusers' own readers."""

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from diffusion_api.job import TrainerSpec
from diffusion_trainer.export import export_diffusers, export_kohya, export_single_file
from diffusion_trainer.export.model_folder import export_model_folder
from diffusion_trainer.methods import attach
from diffusion_trainer.models import open_model
from testkit.tiny_families import make_tiny

CAPTION = "a b c"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return folder


def trained(folder, **sections):
    """Return a family whose adapters have learned something, and what was attached to it."""
    uri = folder.as_uri()
    content = {"method": "LoRA", "lora": {"rank": 4, "alpha": 2}, "dataset": {"source": uri}}
    content |= {"output": {"destination": uri}} | sections
    job = TrainerSpec.model_validate(content | {"model": {"source": uri} | content.get("model", {})})
    family = open_model(folder, job, device="cpu", dtype=torch.float32)
    attached = attach(family, job, seed=1)
    attached.train(mode=False)
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in attached.parameters.items():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=numbers) * 0.2
    return job, family, attached


def sdxl(folder):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)


def answered(pipe, text, pooled):
    numbers = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=numbers)
    added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        return pipe.unet(latents, torch.tensor([300]), text, added_cond_kwargs=added).sample


@pytest.mark.parametrize("export", [export_diffusers, export_kohya])
def test_adapters_of_sdxl_with_both_text_encoders_loaded_by_a_pipeline(folders, tmp_path, export):
    folder = folders("SDXL")
    job, family, attached = trained(folder, model={"textEncoder": {"train": True}})
    (path,) = export(attached.parameters, family, job, folder=tmp_path)
    pipe, base = sdxl(folder), sdxl(folder)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(CAPTION, device="cpu", do_classifier_free_guidance=False)
        before, *_ = base.encode_prompt(CAPTION, device="cpu", do_classifier_free_guidance=False)
    ours = attached.text.encode([CAPTION])
    torch.testing.assert_close(text, ours["text"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(pooled, ours["pooled"], atol=1e-4, rtol=1e-3)
    assert (text - before).abs().max() > 1e-2
    with torch.no_grad():
        numbers = torch.Generator().manual_seed(3)
        latents = torch.randn(1, 4, 8, 8, generator=numbers)
        wanted = family.predict(latents, torch.tensor([300]), ours, torch.zeros(1, 6))
    torch.testing.assert_close(answered(pipe, text, pooled), wanted, atol=1e-4, rtol=1e-3)
    assert (answered(base, text, pooled) - wanted).abs().max() > 1e-3


def test_kohyas_keys_of_sdxl_are_those_of_the_original_network(folders, tmp_path):
    job, family, attached = trained(folders("SDXL"), model={"textEncoder": {"train": True}})
    (path,) = export_kohya(attached.parameters, family, job, folder=tmp_path)
    starts = {name.split("_text_model_")[0].split("_blocks_")[0].split("_block_")[0] for name in load_file(path)}
    assert starts == {"lora_te1", "lora_te2", "lora_unet_input", "lora_unet_middle", "lora_unet_output"}


def sd3(folder):
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)


def same_as_trained(pipe, family, attached):
    """Hold what a pipeline of SD3 says and answers against what the trainer does with the weights in memory."""
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(CAPTION, None, None, do_classifier_free_guidance=False)
        latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
        sigma, ours = torch.tensor([0.3]), attached.text.encode([CAPTION])
        wanted = family.predict(latents, sigma, ours, torch.zeros(1, 6))
        found = pipe.transformer(latents, text, pooled, 1000 * sigma).sample
    torch.testing.assert_close(text, ours["text"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(pooled, ours["pooled"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_adapters_of_sd3_with_both_clips_loaded_by_a_pipeline(folders, tmp_path):
    folder = folders("SD3")
    job, family, attached = trained(folder, model={"textEncoder": {"train": True}})
    (path,) = export_diffusers(attached.parameters, family, job, folder=tmp_path)
    pipe = sd3(folder)
    with pytest.raises(AssertionError):
        same_as_trained(pipe, family, attached)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    same_as_trained(pipe, family, attached)


def test_kohyas_names_of_both_clips_of_sd3(folders, tmp_path):
    """As sd-scripts (networks/lora_sd3.py) and ComfyUI (comfy/lora.py) have them: lora_te1 CLIP-L, lora_te2 CLIP-G.

    No reader of this format is at hand for SD3, so that the numbers are held against those of diffusers' format.
    """
    job, family, attached = trained(folders("SD3"), model={"textEncoder": {"train": True}})
    (path,) = export_kohya(attached.parameters, family, job, folder=tmp_path)
    content = load_file(path)
    starts = {name.split("_layers_")[0].split("_blocks_")[0] for name in content}
    assert starts == {"lora_te1_text_model_encoder", "lora_te2_text_model_encoder", "lora_unet_joint"}
    inside = {"mlp_fc1", "mlp_fc2", *(f"self_attn_{part}_proj" for part in ("k", "out", "q", "v"))}
    for number, folder, layers in (("1", "text_encoder", 2), ("2", "text_encoder_2", 3)):
        modules = {name.partition(".")[0] for name in content if name.startswith(f"lora_te{number}_")}
        start = f"lora_te{number}_text_model_encoder_layers_"
        assert modules == {f"{start}{layer}_{name}" for layer in range(layers) for name in inside}
        module = f"{folder}.text_model.encoder.layers.1.mlp.fc2"
        assert torch.equal(content[f"{start}1_mlp_fc2.lora_up.weight"], attached.parameters[f"{module}.lora_B.weight"])
        assert content[f"{start}1_mlp_fc2.alpha"] == 2


@pytest.mark.parametrize("method", ["FineTune", pytest.param("DreamBooth", marks=pytest.mark.nightly)])
def test_whole_clips_of_sd3_are_in_folder_and_single_file(folders, tmp_path, method):
    booth = {"instancePrompt": "a b", "classPrompt": "a", "adapter": "None"}
    sections = {"dreamBooth": booth} if method == "DreamBooth" else {}
    folder = folders("SD3")
    job, family, attached = trained(
        folder, method=method, lora=None, model={"textEncoder": {"train": True}}, **sections
    )
    numbers = torch.Generator().manual_seed(0)
    for parameter in attached.parameters.values():
        parameter.data += torch.randn(parameter.shape, generator=numbers) * 0.02
    t5 = family.text_encoders["text_encoder_3"]
    assert not any(parameter.requires_grad for parameter in t5.parameters())
    export_model_folder(attached.parameters, family, job, folder=tmp_path / "folder")
    same_as_trained(sd3(tmp_path / "folder"), family, attached)
    with pytest.raises(AssertionError):
        same_as_trained(sd3(folder), family, attached)
    (path,) = export_single_file(attached.parameters, family, job, folder=tmp_path)
    content = load_file(path)
    for component, found in back(content, "SD3", folder):
        (file,) = (tmp_path / "folder" / component).glob("*.safetensors")
        wanted = load_file(file)
        if component != "transformer" and not component.endswith("_3"):
            wanted = {n if n.startswith("text_") else f"text_model.{n}": t for n, t in wanted.items()}
        assert found.keys() == wanted.keys(), component
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), component
    # What readers of single files leave out of CLIP-L has learned nothing.
    projection = "text_projection.weight"
    published = load_file(folder / "text_encoder" / "model.safetensors")[projection]
    assert torch.equal(content[f"text_encoders.clip_l.transformer.{projection}"], published)
    assert f"text_encoder_2.{projection}" in attached.parameters


def back(content, family, folder):
    """Return the denoiser's and text encoders' weights of a single file by diffusers' names."""
    if family == "SD3":
        yield (
            "transformer",
            single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
                {name: tensor for name, tensor in content.items() if name.startswith("model.diffusion_model.")}
            ),
        )
        for component, prefix in (
            ("text_encoder", "clip_l"),
            ("text_encoder_2", "clip_g"),
            ("text_encoder_3", "t5xxl"),
        ):
            start = f"text_encoders.{prefix}.transformer."
            yield component, {n.removeprefix(start): t for n, t in content.items() if n.startswith(start)}
        return
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = UNet2DConditionModel.load_config(folder / "unet")
    yield "unet", single_file_utils.convert_ldm_unet_checkpoint(dict(content), config)
    if family == "SDXL":
        yield "text_encoder", single_file_utils.convert_ldm_clip_checkpoint(dict(content))
    name, prefix = {
        "SD2": ("text_encoder", "cond_stage_model.model."),
        "SDXL": ("text_encoder_2", "conditioner.embedders.1.model."),
    }[family]
    clip = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / name))
    yield name, single_file_utils.convert_open_clip_checkpoint(clip, dict(content), prefix)


@pytest.mark.parametrize("family", ["SD2", "SDXL", "SD3"])
def test_the_single_file_holds_the_model(folders, tmp_path, family):
    """With adapters that have learned nothing, all of it is what was published."""
    folder = folders(family)
    job, opened, attached = trained(folder, output={"destination": folder.as_uri(), "formats": ["SingleFile"]})
    for name, parameter in attached.parameters.items():
        if ".lora_B." in name:
            parameter.data.zero_()
    (path,) = export_single_file(attached.parameters, opened, job, folder=tmp_path)
    content = load_file(path)
    for component, found in back(content, family, folder):
        (file,) = (folder / component).glob("*.safetensors")
        wanted = load_file(file)
        prefixed = not component.endswith("_3") and component.startswith("text")
        names = {n if not prefixed or n.startswith("text_") else f"text_model.{n}": t for n, t in wanted.items()}
        assert set(found) == set(names), component
        assert all(torch.equal(found[name], names[name]) for name in names), component
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert sum(name.startswith("first_stage_model.") for name in content) == len(vae)
