"""Models as they are published: full size on torch's meta device, with all that lies in and beside their files."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from diffusion_api.model import Model
from diffusion_trainer.data import DatasetLock, LockedImage
from diffusion_trainer.errors import BadConfig, BadData, InputMissing
from diffusion_trainer.export import original_names
from diffusion_trainer.export.adapter_names import kohya_denoiser
from diffusion_trainer.export.components import _single
from diffusion_trainer.export.kohya_mmdit import Adapter, kohya_mmdit
from diffusion_trainer.export.original_mmdit import mmdit
from diffusion_trainer.export.original_text import clip, open_clip
from diffusion_trainer.export.single_file import architecture
from diffusion_trainer.methods.lora import DOWN
from diffusion_trainer.models.latent import unet_targets
from diffusion_trainer.models.sd3 import StableDiffusion3
from diffusion_trainer.models.single_file.configurations import configurations, family_of
from diffusion_trainer.models.single_file.published import DENOISER, TEXTS
from diffusion_trainer.models.single_file.weights import converted
from diffusion_trainer.models.sources import Unfolded
from diffusion_trainer.models.survey import look_at
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.preparation import check_sizes
from testkit import architectures

MODULES = {
    "SD1": {"Attention": 128, "AttentionAndFeedForward": 160},
    "SD2": {"Attention": 128, "AttentionAndFeedForward": 160},
    "SDXL": {"Attention": 560, "AttentionAndFeedForward": 700},
    "SD3-medium": {"Attention": 191, "AttentionAndFeedForward": 285},
    "SD3.5-medium": {"Attention": 243, "AttentionAndFeedForward": 337},
    "SD3.5-large": {"Attention": 303, "AttentionAndFeedForward": 453},
}
"""Eight linear layers of attention for each block of a UNet (16, 16 and 70 blocks), two of feed-forward. Of a joint
block eight and four, without those that the last block's text has no use for, and four for each second attention.
"""
FUSED = {"SD3-medium": (95, 189), "SD3.5-medium": (121, 215), "SD3.5-large": (151, 301)}
"""Where queries, keys and values are one layer."""


def meta(make, name):
    with torch.device("meta"):
        return make(name)


@pytest.mark.parametrize("name", MODULES)
def test_every_adapter_of_a_full_size_model_has_a_layer_in_the_original_network(name):
    denoiser = meta(architectures.denoiser, name)
    published = denoiser.state_dict()
    layers = {path for path, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    for place, (targets, modules) in enumerate(MODULES[name].items()):
        wanted = StableDiffusion3.lora_target_modules(None, targets) if "SD3" in name else unet_targets(targets)
        paths = sorted(path for path in layers if path.endswith(tuple(f".{suffix}" for suffix in wanted)))
        assert len(paths) == modules
        if "SD3" in name:
            made = {
                path: Adapter(
                    torch.empty(4, published[f"{path}.weight"].shape[1], device="meta"),
                    torch.empty(published[f"{path}.weight"].shape[0], 4, device="meta"),
                )
                for path in paths
            }
            kohya = {key: (one.up.shape[0], one.down.shape[1]) for key, one in kohya_mmdit(made).items()}
            originals, count = mmdit(published), FUSED[name][place]
        else:
            names = kohya_denoiser(paths, published, "SDXL" if name == "SDXL" else "SD1")
            kohya, count = {names[path]: tuple(published[f"{path}.weight"].shape) for path in paths}, modules
            originals = {new: published[old] for old, new in original_names.unet(published).items()}
            originals = originals if name == "SDXL" else {f"{DENOISER}{key}": value for key, value in published.items()}
        places = {
            "lora_unet_" + key.removeprefix(DENOISER).removesuffix(".weight").replace(".", "_"): tuple(value.shape)
            for key, value in originals.items()
            if key.endswith(".weight")
        }
        assert len(kohya) == count
        assert {key: places.get(key) for key in kohya} == kohya


@pytest.mark.parametrize("name", ["SD1", "SD3.5-medium"])
def test_peft_finds_the_layers_that_are_counted(name):
    denoiser = meta(architectures.denoiser, name)
    wanted = StableDiffusion3.lora_target_modules(None, "Attention") if "SD3" in name else unet_targets("Attention")
    with torch.device("meta"):
        inject_adapter_in_model(LoraConfig(r=1, target_modules=wanted, init_lora_weights=False), denoiser)
    down = DOWN.replace(".weight", ".default.weight")
    assert sum(key.endswith(down) for key, _ in denoiser.named_parameters()) == MODULES[name]["Attention"]


@pytest.mark.parametrize(("name", "side"), [("SD3-medium", 3072), ("SD3.5-medium", 6144), ("SD3.5-large", 3072)])
def test_pictures_that_are_longer_than_the_places_of_sd3_are_refused(name, side):
    """As 2048 px with an aspect ratio of 3 would make them; diffusers refuses them in the first step."""
    denoiser = SimpleNamespace(config=architectures.DENOISERS[name])
    family = SimpleNamespace(name="SD3", size_multiple=16, denoiser=denoiser)

    def lock(width):
        return DatasetLock((LockedImage("a", "a.png", 80, 80, "c", (width, 64), "train"),), {}, {})

    check_sizes(lock(side), family)
    with pytest.raises(BadConfig, match=rf"images of {side + 64} px, but this SD3 knows places of {side} px at most"):
        check_sizes(lock(side + 64), family)


# --- single files ---


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("SD3-medium", "stable-diffusion-v3-medium"),
        ("SD3.5-medium", "stable-diffusion-v3.5-medium"),
        ("SD3.5-large", "stable-diffusion-v3.5-large"),
    ],
)
def test_exports_of_sd3_name_the_network_as_programs_know_it(name, known):
    """A LoRA of SD3.5 large that says it is of SD3 is offered for the wrong model, or for none."""
    assert architecture(SimpleNamespace(name="SD3", denoiser=meta(architectures.denoiser, name))) == known
    other = SimpleNamespace(config=architectures.DENOISERS[name] | {"num_layers": 2})
    assert architecture(SimpleNamespace(name="SD3", denoiser=other)) == "stable-diffusion-3"


def single(name, *, refiner=False):
    """Return the tensors of a published single file, and what lies in such files without being of use."""
    unet, vae = meta(architectures.denoiser, name).state_dict(), meta(architectures.vae, name).state_dict()
    content = {new: unet[key] for key, new in original_names.unet(unet).items()}
    content |= {new: vae[key] for key, new in original_names.vae(vae).items()}
    encoders = [encoder.state_dict() for encoder in meta(architectures.text_encoders, name)]
    prefixes = ["conditioner.embedders.0.model."] if refiner else list(TEXTS[name].values())
    for prefix, encoder in zip(prefixes, encoders[1:] if refiner else encoders, strict=True):
        content |= (open_clip if prefix.endswith(".model.") else clip)(encoder, prefix)
        content[f"{prefix}logit_scale"] = torch.empty((), device="meta")
        content[f"{prefix}text_model.embeddings.position_ids"] = torch.empty(1, 77, device="meta")
    extra = ("alphas_cumprod", "betas", "model_ema.decay", "model_ema.diffusion_modelinput_blocks00weight")
    return content | {key: torch.empty(1000, device="meta") for key in (*extra, "denoiser.sigmas")}


def shapes(tensors):
    return {key: tuple(value.shape) for key, value in tensors.items()}


@pytest.mark.parametrize("name", ["SD1", "SD2", "SDXL"])
def test_a_published_single_file_is_read_without_leftovers(name):
    content = single(name)
    found = configurations(shapes(content), where="x")
    assert family_of(shapes(content), where="x") == name
    unet = meta(architectures.denoiser, name).state_dict()
    tensors = {key: value for key, value in content.items() if key.startswith(DENOISER)}
    assert shapes(converted(tensors, DENOISER, found["unet/config.json"])) == shapes(unet)
    for (folder, prefix), encoder in zip(TEXTS[name].items(), meta(architectures.text_encoders, name), strict=True):
        tensors = {key: value for key, value in content.items() if key.startswith(prefix)}
        # OpenCLIP's biases are cut in three, which only real numbers can be told from.
        read = converted(dict(tensors), prefix, found[f"{folder}/config.json"])
        read = {key.removeprefix("text_model.") for key in read} - {"logit_scale"}
        assert read == {key.removeprefix("text_model.") for key in encoder.state_dict()}


def test_a_refiner_is_refused():
    with pytest.raises(BadData, match="with other text encoders than those of SD1, SD2 or SDXL base"):
        configurations(shapes(single("SDXL", refiner=True)), where="x")


# --- folders ---

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
FOLDER = {
    "model_index.json": INDEX,
    "feature_extractor/preprocessor_config.json": {"feature_extractor_type": "CLIPFeatureExtractor"},
    "safety_checker/config.json": {"architectures": ["StableDiffusionSafetyChecker"]},
    "safety_checker/model.safetensors": {},
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "trained_betas": None, "steps_offset": 1},
    "text_encoder/config.json": {"architectures": ["CLIPTextModel"]},
    "text_encoder/model.safetensors": {},
    "text_encoder/model.fp16.safetensors": {},
    "text_encoder/pytorch_model.bin": {},
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
    "unet/config.json": {"_class_name": "UNet2DConditionModel", "in_channels": 4, **architectures.DENOISERS["SD1"]},
    "unet/diffusion_pytorch_model.safetensors": {},
    "unet/diffusion_pytorch_model.fp16.safetensors": {},
    "unet/diffusion_pytorch_model.non_ema.safetensors": {},
    "vae/config.json": {"_class_name": "AutoencoderKL", "latent_channels": 4, "force_upcast": True},
    "vae/diffusion_pytorch_model.safetensors": {},
    "v1-5-pruned-emaonly.safetensors": {},
    "v1-inference.yaml": {},
}
DDPM = {
    "model_index.json": {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    },
    "config.json": {"_class_name": "UNet2DModel", **architectures.DENOISERS["UNet2D"]},
    "scheduler_config.json": {"_class_name": "DDPMScheduler", "trained_betas": None},
    "diffusion_pytorch_model.safetensors": {},
    "diffusion_pytorch_model.bin": {},
}


def looked_at(tmp_path, files):
    for name, content in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(json.dumps(content))
    uri = (tmp_path / "model").as_uri()
    return look_at(Model(source=uri), Unfolded(open_store(uri)), work=tmp_path / "work")


def without(files, *names, **changes):
    kept = {key: value for key, value in files.items() if key not in names}
    return kept | {key: files.get(key, {}) | change for key, change in changes.items()}


def test_a_published_folder_passes_with_all_that_lies_in_it(tmp_path):
    found = looked_at(tmp_path, FOLDER)
    assert (found.family, found.architecture, found.predicts) == ("SD1", "SD1", "epsilon")


def test_a_network_beside_the_index_is_that_of_the_published_unconditional_models(tmp_path):
    """google/ddpm-*: diffusers, too, looks beside the index for a component that has no folder."""
    found = looked_at(tmp_path, DDPM)
    assert (found.family, found.architecture) == ("UNet2D", "UNet2D")
    source, copy = Unfolded(open_store((tmp_path / "model").as_uri())), tmp_path / "copy.json"
    assert "unet/diffusion_pytorch_model.safetensors" in {info.key for info in source.list()}
    source.get_to_file("unet/config.json", copy)
    assert json.loads(copy.read_text())["_class_name"] == "UNet2DModel"


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (FOLDER, {"unet/config.json": {"in_channels": 9}}, "in_channels 9, as inpainting models have"),
        (FOLDER, {"vae/config.json": {"latent_channels": 16}}, "latent_channels 16, but the denoiser takes 4"),
        (FOLDER, {"vae/config.json": {"latents_mean": [0.0] * 4}}, "latents_mean"),
        (DDPM, {"config.json": {"in_channels": 6}}, "three channels and nothing else"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused_before_there_is_a_gpu(tmp_path, files, changes, message):
    with pytest.raises(BadData, match=message):
        looked_at(tmp_path, without(files, **changes))


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("text_encoder/model.safetensors", "has text_encoder/model.fp16.safetensors, text_encoder/pytorch_model.bin,"),
        ("unet/diffusion_pytorch_model.safetensors", "has unet/diffusion_pytorch_model.fp16.safetensors, unet/"),
    ],
)
def test_weights_by_other_names_are_named(tmp_path, left_out, named):
    with pytest.raises(InputMissing, match=re.escape(named)):
        looked_at(tmp_path, without(FOLDER, left_out))


def test_positions_of_tokens_stay_integers_in_a_trained_text_encoder():
    assert _single(torch.arange(77)[None]).dtype == torch.int64
    assert _single(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
