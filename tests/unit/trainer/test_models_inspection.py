"""A model's files are looked at before any library opens them."""

import json
from contextlib import nullcontext

import pytest
import torch

from diffusion_api.job import TrainerSpec
from diffusion_trainer.errors import BadConfig, BadData, InputMissing
from diffusion_trainer.models import fetch_model, open_model
from diffusion_trainer.models.inspection import TRAINABLE, check_files, check_fit, family_of
from diffusion_trainer.models.sources import TextFolders, WithOtherText, WithOtherVae
from diffusion_trainer.models.survey import look_at
from diffusion_trainer.objectstore import open_store

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
FILES = {
    "model_index.json": INDEX,
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler"},
    "text_encoder/config.json": {"architectures": ["CLIPTextModel"]},
    "text_encoder/model.safetensors": None,
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"},
    "unet/config.json": {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768},
    "unet/diffusion_pytorch_model.safetensors": None,
    "vae/config.json": {"_class_name": "AutoencoderKL"},
    "vae/diffusion_pytorch_model.safetensors": None,
}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        write(tmp_path / "model" / name, content)
    return tmp_path / "model"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights" if content is None else json.dumps(content).encode())


def spec(folder, **model):
    return TrainerSpec.model_validate(
        {
            "method": "LoRA",
            "model": {"source": folder.as_uri(), **model},
            "dataset": {"source": folder.as_uri()},
            "output": {"destination": folder.as_uri()},
        }
    )


def opened(folder, **model):
    return open_model(folder, spec(folder, **model), device="cpu", dtype=torch.float32)


def test_a_clean_model_passes(folder):
    assert family_of(folder) == "SD1"
    assert sorted(check_files(folder, TRAINABLE["SD1"])) == [name for name in FILES if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model_index.json", {"unet": ["evil", "UNet2DConditionModel"]}, "gives evil.UNet2DConditionModel for unet"),
        (
            "model_index.json",
            {"vae": ["diffusers", "os.system"]},
            "gives diffusers.os.system for vae; allowed is AutoencoderKL",
        ),
        ("model_index.json", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "for scheduler"),
        ("model_index.json", {"auto_map": {}}, "'auto_map'"),
        ("unet/config.json", {"_class_name": "Evil"}, "names the class 'Evil' for unet"),
        ("unet/config.json", {"quantization_config": {"quant_method": "gguf"}}, "'quantization_config'"),
        ("text_encoder/config.json", {"architectures": ["EvilModel"]}, "'EvilModel'"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "text_encoder/config.json has the key"),
        ("text_encoder/config.json", {"text_config": {"deep": [{"auto_map": 1}]}}, "'auto_map'"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}, "'EvilTokenizer'"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "'auto_map'"),
    ],
)
def test_whatever_could_name_code_is_refused(folder, name, change, message):
    write(folder / name, FILES[name] | change)
    with pytest.raises(BadData, match=message):
        opened(folder)


@pytest.mark.parametrize("name", ["unet/model.py", "pipeline.py", "tokenizer/x.so", "deep/er/a.pyc"])
def test_code_is_refused_wherever_it_lies(folder, name):
    write(folder / name, None)
    with pytest.raises(BadData, match=f"{name} is code"):
        opened(folder)
    with pytest.raises(BadData, match=f"{name} is code"):
        fetch_model(open_store(folder.as_uri()), folder.parent / "work", report=lambda _: None)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[1]", b"\xff"])
def test_broken_json_is_bad_data(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(BadData, match=r"no valid JSON|no JSON object"):
        opened(folder)


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputMissing, match=name):
        opened(folder)


def test_pickles_do_not_stand_in_for_safetensors(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(
        InputMissing, match=r"there is diffusion_pytorch_model\.bin.*pickles run code.*safe_serialization"
    ):
        opened(folder)


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_a_missing_component_is_named(folder, entry):
    write(folder / "model_index.json", INDEX | {"vae": entry})
    with pytest.raises(InputMissing, match="no component vae"):
        opened(folder)


@pytest.mark.parametrize(
    ("pipeline", "family"),
    [
        ("StableDiffusionXLPipeline", "SDXL"),
        ("StableDiffusion3Pipeline", "SD3"),
        ("DDPMPipeline", "UNet2D"),
        ("DDIMPipeline", "UNet2D"),
    ],
)
def test_the_pipeline_says_which_family_it_is(folder, pipeline, family):
    write(folder / "model_index.json", INDEX | {"_class_name": pipeline})
    assert family_of(folder) == family


@pytest.mark.parametrize("sign", [{"cross_attention_dim": 1024}, {"use_linear_projection": True}])
def test_sd2_is_told_from_sd1_by_its_unet(folder, sign):
    write(folder / "unet/config.json", FILES["unet/config.json"] | sign)
    assert family_of(folder) == "SD2"
    with pytest.raises(BadData, match=r"family is SD1, but .* is SD2; use Auto"):
        opened(folder, family="SD1")


def test_every_family_has_a_denoiser_and_a_scheduler():
    for family, components in TRAINABLE.items():
        assert {"unet", "transformer"} & components.keys(), family
        assert {"scheduler"} <= components.keys()
        texts = {name for name in components if name.startswith("text_encoder")}
        assert {name.replace("text_encoder", "tokenizer") for name in texts} <= components.keys()


# --- shards: what does not fit into one file -----------------------------------------------------------------------

SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
SHARD_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def sharded(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    names = [name.removeprefix("unet/") for name in SHARDS]
    write(folder / SHARD_INDEX, {"weight_map": {"a": names[0], "b": names[1], "c": names[1]}})
    for name in SHARDS:
        write(folder / name, None)
    return folder


def test_shards_are_weights(sharded):
    found = check_files(sharded, TRAINABLE["SD1"])
    assert set(SHARDS) < found.keys()
    assert all(path == sharded / name for name, path in found.items())
    assert len(found) == 4


def test_shards_are_fetched_unless_the_whole_file_is_there(sharded, tmp_path):
    copy = fetch_model(open_store(sharded.as_uri()), tmp_path / "work", report=lambda _: None)
    assert all((copy / name).is_file() for name in (*SHARDS, SHARD_INDEX))
    write(sharded / "unet/diffusion_pytorch_model.safetensors", None)
    copy = fetch_model(open_store(sharded.as_uri()), tmp_path / "again", report=lambda _: None)
    # The index neither: diffusers would look for what it names.
    assert not any((copy / name).is_file() for name in (*SHARDS, SHARD_INDEX))
    assert (copy / "unet/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "model.bin", "x-00001-of-00002.safetensors", 7])
def test_an_index_of_shards_leads_nowhere_else(sharded, name):
    write(sharded / SHARD_INDEX, {"weight_map": {"a": name}})
    with pytest.raises(BadData, match=r"allowed are files such as diffusion_pytorch_model-00001-of-00002.safetensors"):
        opened(sharded)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_shards_is_refused(sharded, content):
    write(sharded / SHARD_INDEX, content)
    with pytest.raises(BadData, match="names 'no file'"):
        opened(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(InputMissing, match=f"{SHARDS[1]} is missing, which .*index.json names"):
        opened(sharded)


def test_an_unknown_pipeline_is_refused(folder):
    write(folder / "model_index.json", INDEX | {"_class_name": "EvilPipeline"})
    with pytest.raises(BadData, match="'EvilPipeline', which is no family"):
        opened(folder)


def test_an_inpainting_model_is_refused(folder):
    write(folder / "unet/config.json", FILES["unet/config.json"] | {"in_channels": 9})
    with pytest.raises(BadData, match="in_channels 9"):
        opened(folder)


def test_fetching_takes_what_is_needed_and_no_more(folder, tmp_path):
    extra = (
        "safety_checker/pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/a.bin",
        "cat.png",
    )
    for name in (*extra, "tokenizer/vocab.json", "tokenizer/merges.txt"):
        write(folder / name, {})
    told = []
    copy = fetch_model(open_store(folder.as_uri()), tmp_path / "work", report=told.append)
    got = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert got == {*FILES, "tokenizer/vocab.json", "tokenizer/merges.txt"}
    assert len(told) == 1


@pytest.mark.parametrize("inside", ["", "vae/"])
def test_another_vae_takes_the_place_of_the_models_own(folder, tmp_path, inside):
    other = tmp_path / "other"
    write(other / f"{inside}config.json", {"_class_name": "AutoencoderKL", "scaling_factor": 2})
    write(other / f"{inside}diffusion_pytorch_model.safetensors", {"other": 1})
    write(other / f"{inside}README.md", {})
    if inside:
        write(other / "unet/config.json", {"_class_name": "Another"})
    write(folder / "vae/merges.txt", {})
    source = WithOtherVae(open_store(folder.as_uri()), open_store(other.as_uri()))
    copy = fetch_model(source, tmp_path / "work", report=lambda _: None)
    assert json.loads((copy / "vae/config.json").read_text())["scaling_factor"] == 2
    assert b"other" in (copy / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    assert sorted(path.name for path in (copy / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((copy / "unet/config.json").read_text()) == FILES["unet/config.json"]


def test_a_vae_that_is_not_there_is_missing_input(folder, tmp_path):
    write(tmp_path / "other/readme.txt", {})
    source = WithOtherVae(open_store(folder.as_uri()), open_store((tmp_path / "other").as_uri()))
    with pytest.raises(
        InputMissing, match=r"model\.vae file://.*/other/ has no config\.json; give the folder of a VAE"
    ):
        fetch_model(source, tmp_path / "work", report=lambda _: None)


def test_a_vae_is_looked_at_like_the_rest(folder, tmp_path):
    write(tmp_path / "other/config.json", {"_class_name": "Evil"})
    write(tmp_path / "other/diffusion_pytorch_model.safetensors", None)
    source = WithOtherVae(open_store(folder.as_uri()), open_store((tmp_path / "other").as_uri()))
    model = spec(folder, vae=(tmp_path / "other").as_uri()).model
    with pytest.raises(BadData, match="names the class 'Evil' for vae"):
        look_at(model, source, work=tmp_path / "work")


@pytest.mark.parametrize(
    ("own", "asked", "refused"),
    [
        ({}, {"zeroTerminalSNR": True}, True),
        ({"prediction_type": "epsilon"}, {"zeroTerminalSNR": True}, True),
        ({}, {"zeroTerminalSNR": True, "predictionType": "VPrediction"}, False),
        ({"prediction_type": "v_prediction"}, {"zeroTerminalSNR": True}, False),
        ({}, {}, False),
    ],
)
def test_noise_at_the_end_and_noise_predicted_is_refused_before_there_is_a_gpu(folder, tmp_path, own, asked, refused):
    write(folder / "scheduler/scheduler_config.json", FILES["scheduler/scheduler_config.json"] | own)
    found = look_at(spec(folder).model, open_store(folder.as_uri()), work=tmp_path / "work")
    job = TrainerSpec.model_validate(spec(folder).to_json_object() | {"training": {"objective": asked}})
    with pytest.raises(BadConfig, match="VPrediction as well") if refused else nullcontext():
        check_fit(found.family, job, predicts=found.predicts)


def test_text_encoders_of_another_place_count_as_far_as_it_has_them(folder, tmp_path):
    write(tmp_path / "other/tokenizer/merges.txt", {})
    write(tmp_path / "other/tokenizer/tokenizer_config.json", {"model_max_length": 9})
    write(tmp_path / "other/text_encoder_3/config.json", {"other": 1})
    write(tmp_path / "other/vae/config.json", {"other": 1})
    write(tmp_path / "other/text_encoder.json", {})
    write(folder / "tokenizer/vocab.json", {})
    text = TextFolders(open_store((tmp_path / "other").as_uri()))
    source = WithOtherText(open_store(folder.as_uri()), text)
    assert text.components == {"tokenizer", "text_encoder_3"}
    copy = fetch_model(source, tmp_path / "work", report=lambda _: None)
    assert sorted(path.name for path in (copy / "tokenizer").iterdir()) == ["merges.txt", "tokenizer_config.json"]
    assert json.loads((copy / "text_encoder_3/config.json").read_text()) == {"other": 1}
    for own in ("text_encoder/config.json", "vae/config.json"):
        assert json.loads((copy / own).read_text()) == FILES[own]


def test_text_encoders_that_are_not_there_are_missing_input(folder, tmp_path):
    write(tmp_path / "other/config.json", {"architectures": ["CLIPTextModel"]})
    source = WithOtherText(open_store(folder.as_uri()), TextFolders(open_store((tmp_path / "other").as_uri())))
    with pytest.raises(InputMissing, match=r"textEncoder\.source file://.*/other/ has no folder text_encoder\* or tok"):
        fetch_model(source, tmp_path / "work", report=lambda _: None)


def test_text_encoders_of_another_place_are_looked_at_like_the_rest(folder, tmp_path):
    write(tmp_path / "other/text_encoder/config.json", {"architectures": ["Evil"]})
    write(tmp_path / "other/text_encoder/model.safetensors", None)
    source = WithOtherText(open_store(folder.as_uri()), TextFolders(open_store((tmp_path / "other").as_uri())))
    model = spec(folder, textEncoder={"source": (tmp_path / "other").as_uri()}).model
    with pytest.raises(BadData, match="names the class 'Evil' for text_encoder"):
        look_at(model, source, work=tmp_path / "work")


def test_fetching_what_is_no_model_is_missing_input(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(InputMissing, match=r"no model_index\.json; give a folder in diffusers layout$"):
        fetch_model(open_store((tmp_path / "m").as_uri()), tmp_path / "work", report=print)
    (tmp_path / "m" / "v1-5.safetensors").write_bytes(b"")
    with pytest.raises(
        InputMissing, match=r"diffusers layout, or name the file itself: file://.*/m/v1-5\.safetensors$"
    ):
        fetch_model(open_store((tmp_path / "m").as_uri()), tmp_path / "work", report=print)
    (tmp_path / "m" / "v1-5.ckpt").write_bytes(b"")
    with pytest.raises(InputMissing, match=r"a \.ckpt is a pickle, which runs code"):
        fetch_model(open_store((tmp_path / "m").as_uri()), tmp_path / "work", report=print)
