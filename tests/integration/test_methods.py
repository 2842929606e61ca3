"""What each method makes trainable in a tiny model of the real classes, and that the model means what it meant."""

import json
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from diffusion_api.job import TrainerSpec
from diffusion_trainer import fitting
from diffusion_trainer.errors import BadConfig, BadData, InputMissing
from diffusion_trainer.methods import attach, check_captions, supply_denoiser
from diffusion_trainer.models import open_model
from testkit.tiny import make_tiny_sd1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sd1(tmp_path_factory.mktemp("tiny") / "model")


def spec(folder, method="LoRA", **sections):
    uri = folder.as_uri()
    content = {"method": method, "dataset": {"source": uri}, "output": {"destination": uri}, **sections}
    return TrainerSpec.model_validate(content | {"model": {"source": uri} | content.get("model", {})})


def opened(job, folder, dtype=torch.float32):
    return open_model(folder, job, device="cpu", dtype=dtype)


def predicted(family, text=None):
    numbers = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=numbers)
    text = torch.randn(2, 77, 32, generator=numbers) if text is None else text
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=family.dtype == torch.bfloat16):
        return family.predict(latents, torch.tensor([10, 900]), {"text": text}, torch.zeros(2, 6)).float()


METHODS = {
    "adapters": ("LoRA", {}),
    "adapters with magnitudes": ("LoRA", {"lora": {"useDora": True}}),
    "adapters with text": ("LoRA", {"model": {"textEncoder": {"train": True}}}),
    "everything": ("FineTune", {}),
    "attention": ("FineTune", {"fineTune": {"parts": "Attention"}}),
    "word": ("TextualInversion", {"textualInversion": {"token": "<a>", "initializerToken": "a"}}),
}


@pytest.mark.parametrize("name", METHODS)
def test_nothing_changes_before_the_first_step(folder, name):
    method, sections = METHODS[name]
    job = spec(folder, method, **sections)
    family, base = opened(job, folder), opened(job, folder)
    attached = attach(family, job, seed=1)
    attached.train()
    attached.masks.draw(1, [(0, 0), (0, 1)], device="cpu")
    assert torch.allclose(predicted(family), predicted(base), atol=1e-5)
    captions = ["a picture", ""]
    text = attached.text
    with torch.no_grad():
        ours = text.conditioning(text.cached(captions))["text"]
    assert torch.allclose(ours, base.encode_text(captions)["text"], atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_exactly_what_is_named_is_trained_and_it_is_fp32(folder, name):
    method, sections = METHODS[name]
    job = spec(folder, method, **sections)
    family = opened(job, folder, dtype=torch.bfloat16)
    attached = attach(family, job, seed=1)
    every = [*family.denoiser.parameters(), *(p for e in family.text_encoders.values() for p in e.parameters())]
    trainable = {id(p) for p in every if p.requires_grad}
    assert trainable == {id(p) for p in attached.parameters.values()}
    assert {p.dtype for p in attached.parameters.values()} == {torch.float32}
    assert list(attached.parameters) == sorted(attached.parameters)
    frozen = {p.dtype for p in family.denoiser.parameters() if not p.requires_grad}
    assert frozen <= {torch.bfloat16}


def test_names(folder):
    """Golden: checkpoints and exports depend on them."""

    def names(method, **sections):
        job = spec(folder, method, **sections)
        return set(attach(opened(job, folder), job, seed=1).parameters)

    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    adapters = names("LoRA", lora={"useDora": True}, model={"textEncoder": {"train": True}})
    for path in (f"{block}attn1.to_q", f"{block}ff.net.2", "text_encoder.text_model.encoder.layers.1.mlp.fc1"):
        assert {f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.lora_magnitude_vector"} <= adapters
    whole = names("FineTune", model={"textEncoder": {"train": True}})
    assert {"conv_in.weight", f"{block}attn2.to_k.weight"} <= whole
    assert "text_encoder.text_model.embeddings.token_embedding.weight" in whole
    cross = names("FineTune", fineTune={"parts": "CrossAttention"})
    assert cross
    assert all(".attn2." in name for name in cross)
    word = {"token": "<a>", "initializerToken": "a"}
    assert names("TextualInversion", textualInversion=word) == {"text_encoder.vectors"}


def test_text_encoders_have_a_learning_rate_of_their_own(folder):
    job = spec(folder, model={"textEncoder": {"train": True, "learningRate": 2e-5}}, training={"learningRate": 1e-4})
    denoiser, text = attach(opened(job, folder), job, seed=1).groups
    assert denoiser.lr_scale == 1
    assert text.lr_scale == pytest.approx(0.2)
    assert all(name.startswith("text_encoder.") for name in text.parameters)


def test_adapters_drop_by_key_alone(folder):
    job = spec(folder, lora={"dropout": 0.3, "rank": 4})
    family = opened(job, folder)
    attached = attach(family, job, seed=1)
    for name, parameter in attached.parameters.items():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    attached.train()
    results = []
    for slots in ([(4, 0), (4, 1)], [(4, 0), (4, 1)], [(5, 0), (5, 1)]):
        attached.masks.draw(1, slots, device="cpu")
        results.append(predicted(family))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-4)
    attached.train(mode=False)
    assert not torch.allclose(predicted(family), results[0], atol=1e-4)


TEXT_IN_THE_STEP = {
    "adapters": ("LoRA", {"lora": {"dropout": 0.3, "rank": 4}, "model": {"textEncoder": {"train": True}}}),
    "everything": ("FineTune", {"model": {"textEncoder": {"train": True}}}),
    "word": METHODS["word"],
}


@pytest.mark.parametrize("name", TEXT_IN_THE_STEP)
def test_recomputing_reaches_the_text_encoders_and_changes_no_bit(folder, name):
    """They are in training mode for that, in which they drop nothing of their own."""
    method, sections = TEXT_IN_THE_STEP[name]
    job, found, calls = spec(folder, method, **sections), [], []
    for recomputed in (False, True):
        family = opened(job, folder)
        encoder = family.text_encoders["text_encoder"]
        for layer in encoder.encoder.layers:
            layer.self_attn.dropout = 0.5  # as a model's configuration may say
        attached = attach(family, job, seed=1)
        for path, parameter in attached.parameters.items():
            if ".lora_B." in path:
                nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
        attached.train()
        fitting.set_recomputing(attached.modules, on=recomputed)
        calls.append([])
        for layer in encoder.encoder.layers:
            layer.mlp.register_forward_pre_hook(partial(lambda seen, *_: seen.append(1), calls[-1]))
        attached.masks.draw(1, [(4, 0), (4, 1)], device="cpu")
        text = attached.text.conditioning(attached.text.cached(["a <a> c", "b"]))["text"]
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        answer = family.predict(latents, torch.tensor([10, 900]), {"text": text}, torch.zeros(2, 6))
        answer.square().mean().backward()
        found.append({path: parameter.grad for path, parameter in attached.parameters.items()})
    assert [len(seen) for seen in calls] == [2, 4]  # two layers, forward and, where recomputed, again
    plain, again = found
    used = [path for path, gradient in plain.items() if gradient is not None and gradient.any()]
    assert any(path.startswith("text_encoder.") for path in used)
    for path in used:
        assert torch.equal(plain[path], again[path]), path


def test_from_scratch_forgets_the_model_and_nothing_else(folder):
    job = spec(folder, "FromScratch")
    family, base = opened(job, folder), opened(job, folder)
    attach(family, job, seed=1)
    assert not torch.allclose(predicted(family), predicted(base), atol=1e-2)
    assert torch.equal(family.encode_text(["a"])["text"], base.encode_text(["a"])["text"])
    again = opened(job, folder)
    attach(again, job, seed=1)
    assert torch.equal(predicted(again), predicted(family))


def without_weights(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return bare


def test_a_configuration_is_enough_for_training_from_scratch(folder, tmp_path):
    """Every attempt makes the same base model of it."""
    job, digests = spec(folder, "FromScratch"), []
    for attempt in ("1", "2"):
        bare = without_weights(folder, tmp_path / attempt)
        supply_denoiser(bare, job, seed=1)
        family = opened(job, bare)
        before = predicted(family)
        attach(family, job, seed=1)
        assert torch.equal(predicted(family), before)
        digests.append(family.file_hashes()["unet/diffusion_pytorch_model.safetensors"])
    assert digests[0] == digests[1]


def test_other_methods_need_the_weights_and_scratch_leaves_them_alone(folder, tmp_path):
    bare, job = without_weights(folder, tmp_path), spec(folder)
    supply_denoiser(bare, job, seed=1)
    with pytest.raises(InputMissing, match=r"unet/diffusion_pytorch_model\.safetensors is missing"):
        opened(job, bare)
    published = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    supply_denoiser(folder, spec(folder, "FromScratch"), seed=1)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == published


def test_nothing_is_built_from_a_configuration_that_names_another_class(folder, tmp_path):
    bare = without_weights(folder, tmp_path)
    config = bare / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "StableUnCLIPPipeline"}))
    with pytest.raises(BadData, match="StableUnCLIPPipeline"):
        supply_denoiser(bare, spec(folder, "FromScratch"), seed=1)
    assert not list((bare / "unet").glob("*.safetensors"))


# --- new words ---


def word(folder, vectors=2, **changes):
    return spec(
        folder,
        "TextualInversion",
        textualInversion={"token": "<a>", "initializerToken": "b", "vectors": vectors} | changes,
    )


def test_a_new_word_is_its_vectors_and_the_end_of_the_text_stays_where_it_was(folder):
    job = word(folder)
    family, base = opened(job, folder), opened(job, folder)
    text = attach(family, job, seed=1).text
    tokens = text.cached(["a <a> c"])["tokens"]
    known = len(base.tokenizers["tokenizer"])
    row = tokens[0].tolist()
    assert row[2:4] == [known, known + 1]  # after the start and "a"
    with torch.no_grad():
        ours = text.conditioning({"tokens": tokens})["text"]
    # As long as the vectors are those of "b", the word reads as "b b".
    assert torch.allclose(ours, base.encode_text(["a b b c"])["text"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializerToken": "two words"}, "initializerToken 'two words' is 8 tokens"),
        ({"token": "b"}, "token 'b' is a word of this model already"),
    ],
)
def test_words_that_cannot_be_taught(folder, changes, message):
    job = word(folder, vectors=1, **changes)
    with pytest.raises(BadConfig, match=message):
        attach(opened(job, folder), job, seed=1)


def test_captions_without_the_word_are_refused(folder):
    check_captions(word(folder), ["a <a>", "<a>"])
    check_captions(spec(folder), ["a"])
    with pytest.raises(BadData, match=r"'<a>' is not in 1 of the captions, e.g. 'a dog'.*captions.prefix"):
        check_captions(word(folder), ["a <a>", "a dog"])


def test_vectors_are_kept_short_after_an_update(folder):
    job = word(folder, vectors=1)
    family = opened(job, folder)
    attached = attach(family, job, seed=1)
    (vectors,) = attached.parameters.values()
    longest = family.text_encoders["text_encoder"].embeddings.token_embedding.weight.norm(dim=1).max()
    vectors.data.mul_(100)
    attached.after_update()
    assert torch.allclose(vectors.detach().norm(dim=1), longest.detach())
