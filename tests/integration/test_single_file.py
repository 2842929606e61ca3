"""Checkpoints in one file: written by the export (other tests hold its names against published ones), and read back."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_api.memory import architecture_of
from diffusion_api.outcomes import ExitCode
from diffusion_trainer.errors import BadConfig, BadData, InputMissing
from diffusion_trainer.export import export_single_file, original_names
from diffusion_trainer.export.original_text import clip, open_clip
from diffusion_trainer.methods import attach
from diffusion_trainer.models import fetch_model, open_model
from diffusion_trainer.models.inspection import check_fit
from diffusion_trainer.models.single_file.configurations import configurations
from diffusion_trainer.models.survey import look_at
from diffusion_trainer.stores import open_stores
from testkit.attempts import TrainerJob
from testkit.single_files import GROUPS, opened, run_of, words
from testkit.tiny import SCHEDULER, UNET, VAE, make_image_folder

FAMILIES = ("SD1", "SD2", "SDXL")
UNETS = {
    "SD1": {"attention_head_dim": 8, "cross_attention_dim": 64},
    "SD2": {"attention_head_dim": (1, 2), "cross_attention_dim": 128, "use_linear_projection": True},
    "SDXL": {
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 64 + 128,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 40,
    },
}
"""Heads and groups as wide as the published ones', which is what cannot be read from a file."""


def make(family, folder):
    """Write the networks of a model in diffusers layout, with what `open_model` needs."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(7)
    UNet2DConditionModel(**UNET | GROUPS | {"block_out_channels": (64, 128)} | UNETS[family]).save_pretrained(
        folder / "unet"
    )
    factor = 0.13025 if family == "SDXL" else 0.18215
    AutoencoderKL(**VAE | GROUPS | {"block_out_channels": (32,) * 4, "scaling_factor": factor}).save_pretrained(
        folder / "vae"
    )
    if family == "SD2":
        CLIPTextModel(words(128, hidden_act="gelu", num_hidden_layers=3)).save_pretrained(folder / "text_encoder")
    else:
        CLIPTextModel(words(64)).save_pretrained(folder / "text_encoder")
    if family == "SDXL":
        second = words(128, hidden_act="gelu", num_hidden_layers=3, projection_dim=40)
        CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return, for a family, its folder and the single file that is exported from it, made once."""
    made = {}

    def of(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            made[family] = make(family, root / "model"), root / "out" / "model.safetensors"
            made[family][1].parent.mkdir()
            save_file(original(made[family][0], family), made[family][1])
            opened(made[family][1], root / "first", family)  # supplies what is no network: tokenizer, scheduler
            for path in (root / "first" / "model").rglob("*"):
                if path.suffix in {".json", ".txt"} and path.name != "config.json":
                    target = made[family][0] / path.relative_to(root / "first" / "model")
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)
        return made[family]

    return of


def original(folder, family):
    """Return the networks of a folder by the original names."""
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    content = {new: unet[name] for name, new in original_names.unet(unet).items()}
    content |= {new: vae[name] for name, new in original_names.vae(vae).items()}
    for name, value in content.items():
        if ".mid.attn_1." in name and value.ndim == 2:
            content[name] = value[:, :, None, None].contiguous()
    text = load_file(folder / "text_encoder/model.safetensors")
    if family == "SD2":
        return content | open_clip(text, "cond_stage_model.model.")
    if family == "SD1":
        return content | clip(text, "cond_stage_model.transformer.")
    second = load_file(folder / "text_encoder_2/model.safetensors")
    content |= clip(text, "conditioner.embedders.0.transformer.")
    return content | open_clip(second, "conditioner.embedders.1.model.")


def said(family):
    """Return what a model makes of captions and latents."""
    numbers = torch.Generator().manual_seed(3)
    encoded = family.encode_text(["a photo of a cat", ""])
    noisy = torch.randn(2, 4, 8, 8, generator=numbers)
    geometry = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    with torch.no_grad():
        predicted = family.predict(noisy, torch.tensor([10, 900]), encoded, geometry)
    return {"predicted": predicted, "decoded": family.decode(noisy), **encoded}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_single_file_is_the_model_that_it_was_made_from(models, tmp_path, name):
    folder, file = models(name)
    model, again = opened(folder, tmp_path / "folder", name), opened(file, tmp_path / "file", name)
    assert (again.name, model.name) == (name, name)
    wanted, found = said(model), said(again)
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():  # the weights are equal below; a step of rounding is the processor's
        torch.testing.assert_close(found[key].float(), value.float(), rtol=0, atol=1 if key == "decoded" else 1e-5)
    for ours, theirs in [
        (model.denoiser, again.denoiser),
        *zip(model.text_encoders.values(), again.text_encoders.values(), strict=True),
    ]:
        weights = theirs.state_dict()
        assert ours.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in ours.state_dict().items())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(again.file_hashes().values()) == {digest}  # a resume compares the file that the user names
    assert set(again.file_hashes()) == set(model.file_hashes())
    assert digest not in model.file_hashes().values()


@pytest.mark.parametrize("name", [*(pytest.param(one, marks=pytest.mark.nightly) for one in FAMILIES[:2]), "SDXL"])
def test_what_is_exported_from_a_single_file_is_that_file(models, tmp_path, name):
    _, file = models(name)
    family = opened(file, tmp_path / "file", name)
    job = run_of(file, name).spec
    (path,) = export_single_file(attach(family, job, seed=1).parameters, family, job, folder=tmp_path / "out")
    before, after = load_file(file), load_file(path)
    assert after.keys() - before.keys() <= {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert before.keys() <= after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_preflight_knows_it_by_its_header(models, tmp_path, name):
    _, file = models(name)
    run = run_of(file, name)
    found = look_at(run.spec.model, open_stores(run, credentials=tmp_path).model, work=tmp_path / "work")
    assert found.family == name
    weights = list((tmp_path / "work").rglob("*.safetensors"))
    assert weights
    assert all(path.stat().st_size == 0 for path in weights)  # nothing was downloaded
    check_fit(found.family, run.spec)


@pytest.mark.nightly
def test_a_whole_run_on_a_single_file(models, trainers, tmp_path):
    """Also in Kohya's format, whose metadata name the checkpoint by its hash."""
    file = models("SD1")[1]
    make_image_folder(tmp_path / "data", 4)
    (tmp_path / "run").mkdir()
    job = TrainerJob(tmp_path / "run", tmp_path, trainers)
    formats = ["Diffusers", "Kohya", "SingleFile"]
    job.overrides = {
        "model": {"source": file.as_uri()},
        "training": {"maxSteps": 2},
        "output": {"destination": f"file://{job.output}", "formats": formats},
    }
    assert job.attempt() == ExitCode.DONE, job.log.read_text()
    with safe_open(job.output / "kohya/lora.safetensors", framework="pt") as exported:
        assert exported.metadata()["ss_new_sd_model_hash"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_file(job.output / "single-file/model.safetensors").keys() >= load_file(file).keys()


def test_captions_become_the_tokens_that_clip_published(models, tmp_path):
    """The first is the example of every tutorial; the second crosses bytes, case and the end of a word."""
    family = opened(models("SD1")[1], tmp_path)
    tokens = family.tokenize(["a photo of a cat", ""])["tokens"]
    assert tokens[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert set(tokens[0, 7:].tolist()) == {49407}
    assert tokens[1, :2].tolist() == [49406, 49407]


def test_sd2_has_to_be_told_what_it_predicts(models, tmp_path):
    file = models("SD2")[1]
    with pytest.raises(BadConfig, match=r"predictionType: Auto.*VPrediction for models of 768 px, Epsilon"):
        opened(file, tmp_path)
    told = run_of(file, training={"maxSteps": 1, "objective": {"predictionType": "VPrediction"}})
    folder = fetch_model(open_stores(told, credentials=tmp_path).model, tmp_path, report=lambda _: None)
    family = open_model(folder, told.spec, device="cpu", dtype=torch.float32)
    assert family.process.prediction_type == family.published.prediction_type == "VPrediction"
    assert set(family.tokenize(["a photo of a cat"])["tokens"][0, 7:].tolist()) == {0}  # padded as OpenCLIP pads


def test_a_file_that_was_trained_over_to_v_says_so(models, tmp_path):
    content = load_file(models("SD1")[1]) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(content, tmp_path / "v.safetensors")
    process = opened(tmp_path / "v.safetensors", tmp_path / "work").process
    assert process.prediction_type == "VPrediction"
    assert process.alphas_cumprod[-1] == 0


def text(folder):
    return {"textEncoder": {"source": folder.as_uri()}}


def flat(content):
    return content | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)}


def narrow(content):
    return content | {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.zeros(33, 64, 3, 3)}


def without(*prefixes):
    return lambda content: {name: value for name, value in content.items() if not name.startswith(prefixes)}


def surplus(content):
    return content | {"model.diffusion_model.input_blocks.1.0.extra.weight": torch.zeros(1)}


def of_a_refiner(content):
    return {name.replace("cond_stage_model.transformer.", "conditioner.x."): t for name, t in content.items()}


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.nightly) for n in ("SD1", "SD2")), "SDXL"])
def test_text_encoders_that_the_file_lacks_come_from_elsewhere(models, tmp_path, name):
    folder, file = models(name)
    bare, work = tmp_path / "x.safetensors", tmp_path / "work"
    save_file(without("cond_stage_model.", "conditioner.")(load_file(file)), bare)
    lacking = "text_encoder, text_encoder_2" if name == "SDXL" else "text_encoder"
    with pytest.raises(
        InputMissing, match=rf"a single file of {name} that has no {lacking}; set model\.textEncoder\.so"
    ):
        opened(bare, work, name)
    model, again = opened(folder, tmp_path / "folder", name), opened(bare, work, name, **text(folder))
    assert again.name == name
    assert again.text_hash() == model.text_hash()
    wanted, found = said(model), said(again)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].float(), value.float(), rtol=0, atol=1 if key == "decoded" else 1e-5)


def test_text_encoders_of_another_family_are_refused_before_there_is_a_gpu(models, tmp_path):
    bare = tmp_path / "x.safetensors"
    save_file(without("cond_stage_model.")(load_file(models("SD1")[1])), bare)
    run = run_of(bare, model={"source": bare.as_uri(), **text(models("SD2")[0])})
    with pytest.raises(
        BadData, match=r"takes text 64 wide, and text_encoder give 128; .*\(model\.textEncoder\.source\)"
    ):
        look_at(run.spec.model, open_stores(run, credentials=tmp_path).model, work=tmp_path / "work")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.diffusion_model."), "no whole model by the original names"),
        (of_a_refiner, "other text encoders than those of SD1, SD2 or SDXL base"),
        (without("first_stage_model."), r"looks like SD1 and has no first_stage_model\.encoder"),
        (without("model.diffusion_model.input_blocks.1.0."), r"looks like SD1.*input_blocks\.1\.0"),
        (without("model.diffusion_model.middle_block.1."), r"looks like SD1 and has no .*middle_block\.1"),
        (without("model.diffusion_model.out.0.bias"), r"unet.*cannot be converted|conv_norm_out\.bias"),
        (without("cond_stage_model.transformer.text_model.final_layer_norm.bias"), r"final_layer_norm\.bias"),
        (flat, r"looks like SD1, but .*; use a folder"),
        (narrow, r"cannot be converted"),
        (surplus, r"1 weights differ from those of the published network"),
    ],
)
def test_what_is_no_whole_model_is_refused_with_what_is_missing(models, tmp_path, change, message):
    save_file(change(load_file(models("SD1")[1])), tmp_path / "x.safetensors")
    with pytest.raises(BadData, match=message):
        opened(tmp_path / "x.safetensors", tmp_path / "work")


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + b"\0" * 60, (9).to_bytes(8, "little") + b'{"a": 1} '])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadData, match=r"x\.safetensors (is no safetensors file|has no header)"):
        opened(tmp_path / "x.safetensors", tmp_path / "work")


def test_a_file_that_is_not_there_is_missing_input(tmp_path):
    with pytest.raises(InputMissing, match=r"x\.safetensors is not there"):
        opened(tmp_path / "x.safetensors", tmp_path / "work")


def test_another_vae_takes_the_place_of_the_files_own(models, tmp_path):
    donor, file = opened(models("SDXL")[0], tmp_path / "a"), models("SD1")[1]
    run = run_of(file, model={"source": file.as_uri(), "vae": models("SDXL")[0].as_uri()})
    folder = fetch_model(open_stores(run, credentials=tmp_path).model, tmp_path / "b", report=lambda _: None)
    family = open_model(folder, run.spec, device="cpu", dtype=torch.float32)
    assert family.vae_hash() == donor.vae_hash()
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert family.file_hashes()[vae] == donor.file_hashes()[vae]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configurations_of_published_models_are_the_published_ones(name):
    """From the shapes of networks of the published sizes; the numbers are those of the folders that diffusers made."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    big = {"vocab_size": 49408}
    published = {
        "SD1": {"cross_attention_dim": 768},
        "SD2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        "SDXL": {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    }[name]
    large = CLIPTextConfig(**big, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    huge = CLIPTextConfig(**big, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    giant = CLIPTextConfig(
        **big, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280,
    )  # fmt: skip
    vae = VAE | GROUPS | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**published).state_dict()
        content = {new: unet[key] for key, new in original_names.unet(unet).items()}
        weights = AutoencoderKL(**vae).state_dict()
        content |= {new: weights[key] for key, new in original_names.vae(weights).items()}
        if name == "SD1":
            content |= clip(CLIPTextModel(large).state_dict(), "cond_stage_model.transformer.")
        if name == "SD2":
            content |= open_clip(CLIPTextModel(huge).state_dict(), "cond_stage_model.model.")
        if name == "SDXL":
            content |= clip(CLIPTextModel(large).state_dict(), "conditioner.embedders.0.transformer.")
            second = CLIPTextModelWithProjection(giant).state_dict()
            content |= open_clip(second, "conditioner.embedders.1.model.")
    found = configurations({key: tuple(value.shape) for key, value in content.items()}, where="x")
    config = found["unet/config.json"]
    assert architecture_of(config) == name
    for key, value in published.items():
        assert config[key] == value, key
    assert config["layers_per_block"] == 2
    if name != "SDXL":
        assert config["block_out_channels"] == [320, 640, 1280, 1280]
        assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert found["vae/config.json"]["block_out_channels"] == [128, 256, 512, 512]
    assert found["vae/config.json"]["layers_per_block"] == 2
    text = found["text_encoder/config.json"]
    layers, heads, act = {"SD1": (12, 12, "quick_gelu"), "SD2": (23, 16, "gelu"), "SDXL": (12, 12, "quick_gelu")}[name]
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["hidden_act"]) == (layers, heads, act)
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert found["scheduler/scheduler_config.json"][key] == SCHEDULER[key]
    json.dumps(found)
