"""Checkpoints of SD3 and SD3.5 in one file: written by the export, read back; held against diffusers' own reader."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from diffusion_api.memory import architecture_of
from diffusion_api.outcomes import ExitCode
from diffusion_trainer.errors import BadData, InputMissing
from diffusion_trainer.export import export_single_file, original_names
from diffusion_trainer.export.original_mmdit import mmdit
from diffusion_trainer.export.original_text import clip
from diffusion_trainer.methods import attach
from diffusion_trainer.models.single_file.configurations import configurations
from diffusion_trainer.models.single_file.vocabulary import tokenizer_files
from diffusion_trainer.models.single_file.weights import converted
from diffusion_trainer.models.sources import Converted
from diffusion_trainer.models.survey import look_at
from diffusion_trainer.stores import open_stores
from testkit import architectures
from testkit.attempts import TrainerJob
from testkit.single_files import GROUPS, opened, run_of, words
from testkit.tiny import make_image_folder, write_tokenizer
from testkit.tiny_families import T5_VOCABULARY, VAE_16, write_t5_tokenizer

NAMES = ("SD3.5", pytest.param("SD3", marks=pytest.mark.nightly))
PUBLISHED = ("SD3-medium", "SD3.5-medium", "SD3.5-large")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
DENOISER = "model.diffusion_model."
CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
MMDIT = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 192,
    "pooled_projection_dim": 64 + 40,
    "pos_embed_max_size": 12,
}
TIED = {"encoder.embed_tokens.weight"}
"""T5's words again."""
CHANGES = {"SD3": {}, "SD3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}}


def make(name, folder):
    """Write a whole model in diffusers layout."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(7)
    t5 = T5Config(
        vocab_size=len(T5_VOCABULARY), d_model=192, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False,
    )  # fmt: skip
    first = CLIPTextModelWithProjection(words(64, projection_dim=64))
    torch.nn.init.eye_(first.text_projection.weight)  # as published
    second = CLIPTextModelWithProjection(words(128, hidden_act="gelu", num_hidden_layers=3, projection_dim=40))
    components = {
        "transformer": SD3Transformer2DModel(**MMDIT | CHANGES[name]),
        "vae": AutoencoderKL(**VAE_16 | GROUPS | {"block_out_channels": (32,) * 4}),
        "text_encoder": first,
        "text_encoder_2": second,
        "text_encoder_3": T5EncoderModel(t5),
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    }
    for component, module in components.items():
        module.save_pretrained(folder / component)
    for tokenizer, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_tokenizer(folder / tokenizer, pad=pad)
        for file, content in tokenizer_files().items():
            (folder / tokenizer / file).write_bytes(content)
    write_t5_tokenizer(folder / "tokenizer_3")
    index = {key: ["diffusers", type(module).__name__] for key, module in components.items() if "text" not in key}
    for number, kind in (("", "CLIP"), ("_2", "CLIP"), ("_3", "T5")):
        encoder = "CLIPTextModelWithProjection" if kind == "CLIP" else "T5EncoderModel"
        index[f"text_encoder{number}"] = ["transformers", encoder]
        index[f"tokenizer{number}"] = ["transformers", "CLIPTokenizer" if kind == "CLIP" else "T5TokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    return folder


class Made:
    """A model's folder, opened; the single file that is exported from it; a folder with no more than T5's tokenizer."""

    def __init__(self, name, root):
        self.folder = make(name, root / "model")
        self.model = opened(self.folder, root / "work")
        job = run_of(self.folder).spec
        trained = attach(self.model, job, seed=1).parameters
        (self.file,) = export_single_file(trained, self.model, job, folder=root / "out")
        self.words = root / "words"
        shutil.copytree(self.folder / "tokenizer_3", self.words / "tokenizer_3")

    def less(self, path, *prefixes, **more):
        """Write the file without some of its weights, and with others."""
        kept = {key: value for key, value in load_file(self.file).items() if not key.startswith(prefixes)}
        save_file(kept | more, path)
        return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = Made(name, tmp_path_factory.mktemp("sd3"))
        return made[name]

    return of


def text(folder):
    return {"textEncoder": {"source": folder.as_uri()}}


def networks(family):
    return {"denoiser": family.denoiser, "vae": family._autoencoder._vae, **family.text_encoders}


def differing(one, other):
    """Return the weights that differ between two models of the same layout."""
    found = set()
    for name, network in networks(one).items():
        weights = networks(other)[name].state_dict()
        assert network.state_dict().keys() == weights.keys()
        found |= {
            f"{name}.{key}" for key, value in network.state_dict().items() if not torch.equal(value, weights[key])
        }
    return found


def settings(config):
    """Return what there is in a configuration, its lists as tuples, but where it is from and what is for the eye."""
    plain = {"sample_size", "_name_or_path", "_diffusers_version", "_class_name", "_use_default_values"}
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in dict(config).items()
        if key not in plain
    }


def said(family):
    numbers = torch.Generator().manual_seed(3)
    encoded = family.encode_text(["a photo of a cat", ""])
    noisy = torch.randn(2, 16, 8, 8, generator=numbers)
    with torch.no_grad():
        predicted = family.predict(noisy, torch.tensor([0.1, 0.9]), encoded, torch.zeros(2, 6))
    return {"predicted": predicted, "decoded": family.decode(noisy).float(), **encoded}


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_is_the_model_that_it_was_made_from(models, tmp_path, name):
    made = models(name)
    again = opened(made.file, tmp_path, **text(made.words))
    assert again.name == "SD3"
    assert not differing(made.model, again)
    for component, network in networks(made.model).items():
        if not component.startswith("text"):
            assert settings(networks(again)[component].config) == settings(network.config)
    wanted, found = said(made.model), said(again)
    for key, value in wanted.items():  # equal weights; a step of rounding is the processor's
        torch.testing.assert_close(found[key], value, rtol=0, atol=1 if key == "decoded" else 1e-5)
    assert again.process.config["shift"] == 3.0
    digest = hashlib.sha256(made.file.read_bytes()).hexdigest()
    assert set(again.file_hashes().values()) == {digest}  # a resume compares the file that the user names
    job = run_of(made.file).spec
    (path,) = export_single_file(attach(again, job, seed=1).parameters, again, job, folder=tmp_path / "out")
    before, after = load_file(made.file), load_file(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_own_reader_finds_the_same_weights(models, tmp_path, name):
    """Networks through `from_single_file`, with diffusers' rules for what is in which file."""
    from diffusers import StableDiffusion3Pipeline

    made = models(name)
    pipe = StableDiffusion3Pipeline.from_single_file(
        str(made.file), config=str(made.folder), local_files_only=True, torch_dtype=torch.float32
    )
    again = opened(made.file, tmp_path, **text(made.words))
    read = {"denoiser": pipe.transformer} | {
        name: getattr(pipe, name) for name in networks(again) if name != "denoiser"
    }
    for component, network in networks(again).items():
        theirs = {key: value for key, value in read[component].state_dict().items() if not value.is_meta}
        assert theirs.keys() >= network.state_dict().keys() - TIED
        assert all(torch.equal(value, theirs[key]) for key, value in network.state_dict().items() if key in theirs)


def read(file, folder, **model):
    """Return a file's transformer by diffusers' names, as it is written when the model is fetched."""
    run = run_of(file, model={"source": file.as_uri(), **model})
    store = open_stores(run, credentials=folder).model
    assert list(store.list())
    path = folder / "model" / TRANSFORMER
    store.get_to_file(TRANSFORMER, path)
    return load_file(path)


def test_a_wrong_rule_is_seen(models, tmp_path, monkeypatch):
    """The original has shift and scale in another order at the end, and in the last block's text."""
    made = models("SD3.5")
    wanted = made.model.denoiser.state_dict()
    found = read(made.file, tmp_path / "right", **text(made.words))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    monkeypatch.setattr(single_file_utils, "swap_scale_shift", lambda weight, **_: weight)
    found = read(made.file, tmp_path / "wrong", **text(made.words))
    other = {key for key, value in found.items() if not torch.equal(value, wanted[key])}
    assert other == {
        f"{path}.{kind}"
        for path in ("norm_out.linear", "transformer_blocks.2.norm1_context.linear")
        for kind in ("weight", "bias")
    }


def test_what_the_file_lacks_comes_from_elsewhere(models, tmp_path):
    """The files of SD3.5 hold transformer and VAE; some of others hold the transformer alone."""
    made = models("SD3.5")
    bare = made.less(tmp_path / "x.safetensors", "text_encoders.", "first_stage_model.")
    with pytest.raises(BadData, match=r"x\.safetensors looks like SD3 and has no first_stage_model\.enc.*model\.vae"):
        opened(bare, tmp_path / "a", **text(made.folder))
    family = opened(bare, tmp_path / "b", **text(made.folder), vae=made.folder.as_uri())
    assert not differing(made.model, family)
    assert (family.text_hash(), family.vae_hash()) == (made.model.text_hash(), made.model.vae_hash())
    hashes, others = family.file_hashes(), made.model.file_hashes()
    assert hashes.pop(TRANSFORMER) == hashlib.sha256(bare.read_bytes()).hexdigest()
    assert others.pop(TRANSFORMER)
    assert hashes == others


def test_what_the_file_has_gives_way(models, tmp_path):
    made = models("SD3.5")
    run = run_of(made.file, model={"source": made.file.as_uri(), **text(made.folder)})
    listed = {info.key: info for info in open_stores(run, credentials=tmp_path).model.list()}
    assert type(listed[TRANSFORMER]) is Converted
    assert type(listed["text_encoder/model.safetensors"]) is not Converted
    assert "tokenizer/tokenizer_config.json" in listed


def test_the_preflight_knows_it_by_its_header(models, tmp_path):
    made = models("SD3.5")
    run = run_of(made.file, model={"source": made.file.as_uri(), **text(made.words)})
    found = look_at(run.spec.model, open_stores(run, credentials=tmp_path).model, work=tmp_path / "work")
    assert found.family == "SD3"
    weights = list((tmp_path / "work").rglob("*.safetensors"))
    assert len(weights) == 5
    assert all(path.stat().st_size == 0 for path in weights)  # nothing was downloaded


def test_eight_bits_are_widened_and_no_number_changes(models, tmp_path):
    made = models("SD3.5")
    content = load_file(made.file)
    content |= {key: value.to(torch.float8_e4m3fn) for key, value in content.items() if key.startswith(DENOISER)}
    save_file(content, tmp_path / "x.safetensors")
    found, wanted = read(tmp_path / "x.safetensors", tmp_path, **text(made.words)), made.model.denoiser.state_dict()
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(torch.equal(value.float(), wanted[key].to(torch.float8_e4m3fn).float()) for key, value in found.items())
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(every.to(torch.bfloat16).double().nan_to_num(), every.double().nan_to_num())


@pytest.mark.parametrize("projection", [{}, {f"{CLIP_L}text_projection.weight": torch.ones(8, 8)}])
def test_the_pooled_text_of_clip_l_is_not_projected_whatever_the_file_has(projection):
    content = {f"{CLIP_L}text_model.final_layer_norm.weight": torch.zeros(8, dtype=torch.float16), **projection}
    found = converted(content, CLIP_L, {"hidden_size": 8})
    assert found.keys() == {"text_model.final_layer_norm.weight", "text_projection.weight"}
    assert torch.equal(found["text_projection.weight"], torch.eye(8, dtype=torch.float16))


def test_t5s_words_are_written_once():
    words = torch.zeros(4, 8)
    found = converted({f"{T5}shared.weight": words, f"{T5}encoder.embed_tokens.weight": words}, T5, {})
    assert found.keys() == {"shared.weight"}


BLOCK = f"{DENOISER}joint_blocks.1."


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ([DENOISER], {}, "no whole model by the original names"),
        ([BLOCK], {}, r"looks like SD3, but of its .*joint_blocks\.\* some are missing; use a folder"),
        (
            [f"{BLOCK}x_block.mlp.fc1.bias"],
            {},
            r"x\.safetensors: model\.diffusion_model\.\* .*joint_blocks\.1\.x_block\.mlp",
        ),
        ([], {f"{BLOCK}extra.weight": (1,)}, r"1 weights differ .*joint_blocks\.1\.extra\.weight"),
        ([], {f"{BLOCK}x_block.mlp.fc1.scale_weight": ()}, r"scales of their own .*use the checkpoint in 16 bits"),
        ([], {f"{DENOISER}pos_embed": (1, 143, 128)}, "pos_embed has 143 places, which is no square"),
        ([], {f"{DENOISER}x_embedder.proj.weight": (128, 16)}, r"looks like SD3, but .*; use a folder"),
        ([f"{DENOISER}context_embedder"], {}, r"looks like SD3 and has no .*context_embedder\.weight"),
        ([], {f"{CLIP_L}text_model.embeddings.token_embedding.weight": (50, 64)}, "50 words, where CLIP has 49408"),
        ([f"{T5}shared"], {}, r"looks like SD3 and has no .*shared\.weight"),
    ],
)
def test_what_is_no_whole_model_is_refused_with_what_is_missing(models, tmp_path, dropped, added, message):
    made = models("SD3.5")
    more = {key: torch.zeros(shape) for key, shape in added.items()}
    file = made.less(tmp_path / "x.safetensors", *(dropped or ["-"]), **more)
    with pytest.raises(BadData, match=message):
        read(file, tmp_path, **text(made.words))


def test_an_adapter_is_no_model(tmp_path):
    save_file(
        {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "l.safetensors"
    )
    with pytest.raises(BadData, match=r"l\.safetensors is no whole model by the original names.*adapters"):
        opened(tmp_path / "l.safetensors", tmp_path / "work")


def test_a_file_that_was_cut_off(models, tmp_path):
    whole = models("SD3.5").file.read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadData, match=r"x\.safetensors: .* cannot be converted .*replace it by the original file"):
        read(tmp_path / "x.safetensors", tmp_path, **text(models("SD3.5").words))


@pytest.mark.parametrize(
    ("prefixes", "supplied", "lacking"),
    [
        (["-"], False, "tokenizer_3"),
        ([T5], False, "text_encoder_3, tokenizer_3"),
        (["text_encoders."], True, "text_encoder, text_encoder_2, text_encoder_3"),
    ],
)
def test_text_encoders_that_are_nowhere(models, tmp_path, prefixes, supplied, lacking):
    made = models("SD3.5")
    file = made.less(tmp_path / "x.safetensors", *prefixes)
    message = (
        rf"x\.safetensors is a single file of SD3 that has no {lacking}; set model\.textEncoder\.source to a folder"
    )
    with pytest.raises(InputMissing, match=message):
        opened(file, tmp_path / "work", **(text(made.words) if supplied else {}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configurations_of_published_models_are_the_published_ones(name):
    """From the networks of the published sizes, and back to every weight of them."""
    import transformers
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    with torch.device("meta"):
        transformer, vae = architectures.denoiser(name), architectures.vae(name).state_dict()
        first, second, third = (encoder.state_dict() for encoder in architectures.text_encoders(name))
        content = mmdit(transformer.state_dict())
    content |= {new: vae[key] for key, new in original_names.vae(vae).items()}
    known = single_file_utils.infer_diffusers_model_type(content)
    assert known == {"SD3-medium": "sd3", "SD3.5-medium": "sd35_medium", "SD3.5-large": "sd35_large"}[name]
    content |= clip(first, CLIP_L) | clip(second, CLIP_G) | {f"{T5}{key}": value for key, value in third.items()}
    found = configurations({key: tuple(value.shape) for key, value in content.items()}, where="x")
    config = found["transformer/config.json"]
    assert architecture_of(config) == name
    assert settings(config) == settings({key: transformer.config.get(key) for key in config})
    assert found["vae/config.json"]["latent_channels"] == 16
    assert (found["vae/config.json"]["scaling_factor"], found["vae/config.json"]["shift_factor"]) == (1.5305, 0.0609)
    assert found["scheduler/scheduler_config.json"]["shift"] == 3.0
    with torch.device("meta"):
        again = {
            "transformer": SD3Transformer2DModel.from_config(dict(config)),
            "vae": AutoencoderKL.from_config(dict(found["vae/config.json"])),
        }
        for encoder, kind in (("text_encoder", "CLIPText"), ("text_encoder_2", "CLIPText"), ("text_encoder_3", "T5")):
            config = getattr(transformers, f"{kind}Config")(**found[f"{encoder}/config.json"])
            again[encoder] = getattr(transformers, found[f"{encoder}/config.json"]["architectures"][0])(config)
    wanted = {"transformer": transformer.state_dict(), "vae": vae, "text_encoder": first, "text_encoder_2": second}
    for component, weights in (wanted | {"text_encoder_3": third}).items():
        shapes = {key: value.shape for key, value in weights.items()}
        assert {key: value.shape for key, value in again[component].state_dict().items()} == shapes, component
    tensors = {key: value for key, value in content.items() if key.startswith(DENOISER)}
    back = converted(tensors, DENOISER, found["transformer/config.json"])
    assert {key: value.shape for key, value in back.items()} == {
        key: value.shape for key, value in transformer.state_dict().items()
    }
    json.dumps(found)


@pytest.mark.nightly
def test_a_whole_run_on_a_single_file(models, trainers, tmp_path):
    made = models("SD3.5")
    make_image_folder(tmp_path / "data", 4)
    (tmp_path / "run").mkdir()
    job = TrainerJob(tmp_path / "run", tmp_path, trainers)
    job.overrides = {
        "model": {"source": made.file.as_uri(), **text(made.words)},
        "training": {"maxSteps": 2, "objective": ...},
        "output": {"destination": f"file://{job.output}", "formats": ["Diffusers", "Kohya", "SingleFile"]},
    }
    assert job.attempt() == ExitCode.DONE, job.log.read_text()
    exported, before = load_file(job.output / "single-file/model.safetensors"), load_file(made.file)
    assert exported.keys() == before.keys()
    moved = {key for key, value in before.items() if not torch.equal(value, exported[key])}
    layers = re.compile(r"joint_blocks\.\d\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12])\.weight")
    assert moved == {key for key in before if layers.fullmatch(key.removeprefix(DENOISER))}
