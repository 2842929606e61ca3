"""Exported adapters, proven by loading them again: by hand, by PEFT, and by a pipeline of diffusers.

The rules of kohya's format are written down here a second time, from its sources, so that our map is not checked
against itself.
"""

import hashlib
import json

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion_api.job import TrainerSpec
from diffusion_trainer.export import export_diffusers, export_kohya, export_single_file, original_names
from diffusion_trainer.methods import attach
from diffusion_trainer.models import open_model
from testkit.tiny import make_tiny_sd1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sd1(tmp_path_factory.mktemp("tiny") / "model")


def spec(folder, rank=4, alpha=4.0, targets="AttentionAndFeedForward", **sections):
    return TrainerSpec.model_validate(
        {
            "method": "LoRA",
            "lora": {"rank": rank, "alpha": alpha, "targets": targets},
            "model": {"source": folder.as_uri()},
            "dataset": {"source": folder.as_uri()},
            "output": {"destination": folder.as_uri(), "formats": ["Diffusers", "Kohya"]},
            **sections,
        }
    )


def trained(job, folder):
    """Return a family whose adapters have learned something: B is no longer zero."""
    family = open_model(folder, job, device="cpu", dtype=torch.float32)
    weights = attach(family, job, seed=1).parameters
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in weights.items():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=numbers) * 0.5
    return family, weights


def predicted(unet):
    numbers = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 4, 8, 8, generator=numbers), torch.randn(2, 77, 32, generator=numbers)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), text).sample


def base_unet(folder):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)


def merged_by_hand(path, unet, *, scale=None):
    """Merge as sd-scripts' networks/merge_lora.py does: W + up @ down * alpha / dim, modules found by their name."""
    names = {"lora_unet_" + name.replace(".", "_"): module for name, module in unet.named_modules()}
    tensors = load_file(path)
    for key in sorted(tensors):
        if not key.endswith(".lora_down.weight"):
            continue
        name = key.removesuffix(".lora_down.weight")
        down, up = tensors[key], tensors[name + ".lora_up.weight"]
        factor = tensors[name + ".alpha"].item() / down.shape[0] if scale is None else scale
        names[name].weight.data += factor * (up @ down)
    return unet


ALPHAS = [(4, 4.0), (4, 2.0), (4, 8.0), (3, 1.0)]


@pytest.mark.parametrize(("rank", "alpha"), ALPHAS)
def test_the_kohya_file_merged_by_hand_is_the_model_that_was_trained(folder, tmp_path, rank, alpha):
    job = spec(folder, rank, alpha)
    family, weights = trained(job, folder)
    (path,) = export_kohya(weights, family, job, folder=tmp_path)
    ours = merged_by_hand(path, base_unet(folder))
    output = predicted(family.denoiser)
    assert (predicted(ours) - output).abs().max() < 1e-3
    assert (predicted(base_unet(folder)) - output).abs().max() > 1e-2

    mine = dict(ours.named_modules())
    for name, module in family.denoiser.named_modules():
        if isinstance(module, LoraLayer):
            module.merge()
            assert (mine[name].weight - module.base_layer.weight).abs().max() < 1e-3
    if rank != alpha:  # the bug of diffusers' converter, which takes alpha for rank, would be seen
        wrong = merged_by_hand(path, base_unet(folder), scale=1.0)
        assert (predicted(wrong) - output).abs().max() > 1e-2


def kohya_names(down, middle, up, layers):
    """Return kohya's names: lora_unet_ + the path in diffusers' UNet, dots replaced (sd-scripts, networks/lora.py)."""
    places = [
        *(f"down_blocks_{block}_attentions_{n}" for block, count in down.items() for n in range(count)),
        *(f"mid_block_attentions_{n}" for n in range(middle)),
        *(f"up_blocks_{block}_attentions_{n}" for block, count in up.items() for n in range(count)),
    ]
    return {f"lora_unet_{place}_transformer_blocks_0_{layer}" for place in places for layer in layers}


ATTENTION = [f"attn{i}_{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out_0")]
FEED_FORWARD = ["ff_net_0_proj", "ff_net_2"]


@pytest.mark.parametrize(
    ("targets", "layers"), [("Attention", ATTENTION), ("AttentionAndFeedForward", ATTENTION + FEED_FORWARD)]
)
def test_kohya_keys_are_the_golden_list(folder, tmp_path, targets, layers):
    job = spec(folder, targets=targets)
    family, weights = trained(job, folder)
    (path,) = export_kohya(weights, family, job, folder=tmp_path)
    tensors = load_file(path)
    golden = kohya_names({0: 1, 1: 1}, 1, {0: 2, 1: 2}, layers)
    assert set(tensors) == {
        f"{name}.{part}" for name in golden for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert all(tensors[f"{name}.lora_down.weight"].shape[0] == 4 for name in golden)
    assert {tensors[f"{name}.alpha"].shape for name in golden} == {()}


def test_the_modules_of_the_real_sd1_have_kohyas_names(folder):
    """SD1.5 has two attentions in each of the blocks 0 to 2 down, three in each of 1 to 3 up, one in the middle."""
    from diffusers import UNet2DConditionModel

    from diffusion_trainer.export.adapter_names import kohya_denoiser

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    family = open_model(folder, spec(folder), device="cpu", dtype=torch.float32)
    suffixes = tuple("." + target for target in family.lora_target_modules("AttentionAndFeedForward"))
    paths = [name for name, _ in unet.named_modules() if name.endswith(suffixes)]
    found = list(kohya_denoiser(paths, {}, "SD1").values())
    golden = kohya_names({0: 2, 1: 2, 2: 2}, 1, {1: 3, 2: 3, 3: 3}, ATTENTION + FEED_FORWARD)
    assert len(found) == 160
    assert set(found) == golden


@pytest.mark.parametrize(("rank", "alpha"), ALPHAS)
def test_the_diffusers_file_loaded_by_a_pipeline_is_the_model_that_was_trained(folder, tmp_path, rank, alpha):
    from diffusers import StableDiffusionPipeline

    job = spec(folder, rank, alpha)
    family, weights = trained(job, folder)
    (path,) = export_diffusers(weights, family, job, folder=tmp_path)
    assert path.name == "pytorch_lora_weights.safetensors"
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    assert (predicted(pipe.unet) - predicted(family.denoiser)).abs().max() < 1e-5
    assert {config.lora_alpha for config in pipe.unet.peft_config.values()} == {alpha}


def test_the_kohya_file_loaded_by_a_pipeline_is_the_model_that_was_trained(folder, tmp_path):
    """diffusers reads kohya's format with a converter of its own: one more reader that is not ours."""
    from diffusers import StableDiffusionPipeline

    job = spec(folder, 4, 2.0)
    family, weights = trained(job, folder)
    (path,) = export_kohya(weights, family, job, folder=tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    assert (predicted(pipe.unet) - predicted(family.denoiser)).abs().max() < 1e-5


def test_diffusers_keys_and_metadata(folder, tmp_path):
    job = spec(folder, 4, 2.0)
    family, weights = trained(job, folder)
    (path,) = export_diffusers(weights, family, job, folder=tmp_path)
    assert set(load_file(path)) == {f"unet.{name}" for name in weights}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (4, 2.0)


def kohya_hashes(path):
    """sd-scripts, library/train_util.py: addnet_hash_safetensors reads past the header, to the end."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_kohya_metadata(folder, tmp_path):
    job = spec(folder, 4, 2.0, training={"seed": 7, "objective": {"noiseOffset": 0.05}})
    family, weights = trained(job, folder)
    (path,) = export_kohya(weights, family, job, folder=tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    wanted = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_seed": "7",
        "ss_noise_offset": "0.05",
        "ss_min_snr_gamma": "5.0",
        "ss_resolution": "(512, 512)",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon",
        "sshs_model_hash": kohya_hashes(path),
    }
    assert {key: metadata[key] for key in wanted} == wanted
    assert json.loads(metadata["ss_network_args"]) == {}
    unet = (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(unet).hexdigest()


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 2.0)])
def test_the_single_file_loaded_by_a_pipeline_is_the_model_that_was_trained(folder, tmp_path, rank, alpha):
    """diffusers' way from the original names back to its own is code that is not ours."""
    from diffusers.loaders import single_file_utils

    job = spec(folder, rank, alpha)
    family, weights = trained(job, folder)
    (path,) = export_single_file(weights, family, job, folder=tmp_path)
    content = load_file(path)
    unet = base_unet(folder)
    unet.load_state_dict(single_file_utils.convert_ldm_unet_checkpoint(dict(content), unet.config))
    assert (predicted(unet) - predicted(family.denoiser)).abs().max() < 1e-5
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "vae/config.json").read_text())
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(content), config)
    assert set(back) == set(vae)
    assert all(torch.equal(back[name], vae[name]) for name in vae)
    text = load_file(folder / "text_encoder/model.safetensors")
    prefix = "cond_stage_model.transformer.text_model."
    assert all(torch.equal(content[prefix + name], value) for name, value in text.items())
    assert torch.equal(content[prefix + "embeddings.position_ids"], torch.arange(77)[None])
    assert len(content) == len(unet.state_dict()) + len(vae) + len(text) + 1


def test_the_names_of_the_real_sd1_are_those_of_its_checkpoint():
    """686 weights of the UNet and 248 of the VAE; some names as they stand in v1-5-pruned.ckpt."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet = original_names.unet(UNet2DConditionModel(cross_attention_dim=768).state_dict())
        vae = original_names.vae(
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ).state_dict()
        )
    assert (len(set(unet.values())), len(set(vae.values()))) == (686, 248)
    assert {name.removeprefix("model.diffusion_model.") for name in unet.values()} >= {
        "time_embed.2.bias",
        "input_blocks.0.0.weight",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.11.0.out_layers.3.weight",
        "middle_block.1.proj_in.weight",
        "middle_block.2.in_layers.0.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.8.2.conv.bias",
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
        "out.2.bias",
    }
    assert {name.removeprefix("first_stage_model.") for name in vae.values()} >= {
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.proj_out.weight",
        "encoder.norm_out.weight",
        "decoder.mid.block_2.conv1.weight",
        "decoder.up.0.block.2.norm2.weight",
        "decoder.up.3.upsample.conv.weight",
        "quant_conv.weight",
    }


def test_a_weight_that_is_no_sd1s_is_refused():
    with pytest.raises(ValueError, match=r"class_embedding\.weight is no weight"):
        original_names.unet(["down_blocks.0.resnets.0.norm1.weight", "class_embedding.weight"])


def test_equal_weights_give_equal_files(folder, tmp_path):
    """Whatever the job is called, wherever it lies, and whenever it is exported."""
    for export in (export_kohya, export_diffusers, export_single_file):
        files = []
        for name in ("one", "two"):
            job = spec(folder, 4, 2.0, output={"destination": f"file:///{name}"})
            family, weights = trained(job, folder)
            files += export(weights, family, job, folder=tmp_path / name)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_half_an_adapter_is_refused(folder, tmp_path):
    job = spec(folder)
    family, weights = trained(job, folder)
    for name in (next(iter(weights)), list(weights)[1]):
        rest = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(ValueError, match="pairs"):
            export_kohya(rest, family, job, folder=tmp_path)
        with pytest.raises(ValueError, match="pairs"):
            export_diffusers(rest, family, job, folder=tmp_path)
