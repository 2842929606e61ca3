"""What is trained: dropout without a generator, random weights by name, new words and their lengths."""

import math

import pytest
import torch
from torch import nn

from diffusion_api.method import TextualInversion
from diffusion_trainer.methods.dropout import KeyedDropout, Masks, kept_elements, key_dropout
from diffusion_trainer.methods.from_scratch import initialise
from diffusion_trainer.methods.textual_inversion import ExtendedEmbedding, shorten, written

# --- dropout ---


def masks_of(slots, *, seed=1, layers=2, p=0.25):
    masks = Masks()
    made = [masks.layer(p) for _ in range(layers)]
    masks.draw(seed, slots, device="cpu")
    return made


def dropped(layer, images, elements=4096):
    return layer.train()(torch.ones(images, elements)) == 0


def test_an_image_is_dropped_alike_whoever_computes_it():
    """In a batch of four, in two of two, or alone: only (seed, step, slot, layer) count."""
    whole = dropped(masks_of([(7, slot) for slot in range(4)])[1], 4)
    halves = [dropped(masks_of([(7, slot) for slot in slots])[1], 2) for slots in ((0, 1), (2, 3))]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole[2:3], dropped(masks_of([(7, 2)])[1], 1))


@pytest.mark.parametrize("changed", [{"seed": 2}, {"slots": [(8, 0)]}, {"slots": [(7, 1)]}, {"layer": 1}])
def test_anything_else_is_dropped_differently(changed):
    layer = changed.pop("layer", 0)
    slots = changed.pop("slots", [(7, 0)])
    one, other = dropped(masks_of([(7, 0)])[0], 1), dropped(masks_of(slots, **changed)[layer], 1)
    # Independent masks of probability 1/4 agree on 1/16 + 9/16; three standard deviations of 4096 trials are 0.023.
    assert float((one == other).float().mean()) == pytest.approx(0.625, abs=0.023)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_as_much_is_dropped_as_was_asked_for(probability):
    kept = kept_elements(torch.tensor([[3, -9], [2**31 - 1, -(2**31)]], dtype=torch.int32), 100_000, probability)
    deviation = math.sqrt(probability * (1 - probability) / 200_000)
    assert 1 - float(kept.float().mean()) == pytest.approx(probability, abs=4 * deviation)
    runs = (kept[0, 1:] & kept[0, :-1]).float().mean()  # neighbours are independent
    assert float(runs) == pytest.approx((1 - probability) ** 2, abs=0.01)


def test_the_bits_are_murmur3s():
    """fmix32 in Python's integers; index 0 of key (1, 0) and index 5 of key (7, 9)."""

    def fmix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    keys, half = torch.tensor([[1, 0], [7, 9]], dtype=torch.int32), 0.5
    kept = kept_elements(keys, 64, half)
    for row, (first, second) in enumerate([(1, 0), (7, 9)]):
        bits = [fmix(fmix((i * 0x9E3779B9 + first) % 2**32) ^ second) for i in range(64)]
        # As signed numbers those from 2**31 on are the lower half.
        assert kept[row].tolist() == [b < 2**31 for b in bits]


def test_what_is_left_keeps_the_mean_and_evaluation_drops_nothing():
    layer = masks_of([(0, slot) for slot in range(3)], p=0.2)[0]
    inputs = torch.ones(3, 10, 7)
    assert layer.train()(inputs).unique().tolist() == [0.0, 1.25]
    assert layer.eval()(inputs) is inputs


def test_keys_of_another_micro_batch_are_refused():
    masks = Masks()
    layer = masks.layer(0.5).train()
    with pytest.raises(ValueError, match="2 images are computed, keys were drawn for 0"):
        layer(torch.ones(2, 3))
    masks.draw(1, [(0, 0)], device="cpu")
    with pytest.raises(ValueError, match="2 images are computed, keys were drawn for 1"):
        layer(torch.ones(2, 3))


def test_a_networks_own_dropout_is_replaced():
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0)))
    masks = Masks()
    key_dropout(network, masks)
    assert [type(layer) for layer in network[1]] == [KeyedDropout, nn.Dropout]
    assert masks


# --- random weights ---


def a_network():
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(8, 64, 3),
            "linear": nn.Linear(50, 400),
            "norm": nn.GroupNorm(2, 8),
            "words": nn.Embedding(300, 40),
        }
    )


def test_random_weights_have_torchs_distribution_and_depend_on_their_name_alone():
    network, other = a_network(), nn.ModuleDict({"linear": nn.Linear(50, 400)})
    initialise(network, seed=3)
    initialise(other, seed=3)
    assert torch.equal(network["linear"].weight, other["linear"].weight)
    for weight, inputs in ((network["conv"].weight, 72), (network["linear"].weight, 50), (network["linear"].bias, 50)):
        bound = 1 / math.sqrt(inputs)
        assert weight.abs().max() <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)  # of a uniform distribution
    assert float(network["words"].weight.detach().std()) == pytest.approx(1, rel=0.05)
    assert torch.equal(network["norm"].weight, torch.ones(8))
    assert torch.equal(network["norm"].bias, torch.zeros(8))
    initialise(other, seed=4)
    assert not torch.equal(network["linear"].weight, other["linear"].weight)


def test_a_weight_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"Bilinear\.bias has no rule"):
        initialise(nn.Sequential(nn.Bilinear(2, 2, 2)), seed=1)


# --- new words ---


def test_new_words_have_negative_numbers_and_known_ones_their_rows():
    base = nn.Embedding(5, 3)
    extended = ExtendedEmbedding(base, torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    rows = extended(torch.tensor([[0, -1, 4, -2]]))
    assert torch.equal(rows[0, 1::2], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert torch.equal(rows[0, ::2], base.weight[[0, 4]])
    rows.sum().backward()
    assert torch.equal(extended.vectors.grad, torch.ones(2, 3))


def test_vectors_are_no_longer_than_any_word():
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    shorten(vectors, 1.0)
    assert torch.allclose(vectors, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_a_token_of_several_vectors_is_written_as_several_words():
    """As diffusers' `maybe_convert_prompt` does."""
    three = TextualInversion(token="<cat>", initializer_token="cat", vectors=3)
    assert written("a <cat>, <cat>!", three) == "a <cat> <cat>_1 <cat>_2, <cat> <cat>_1 <cat>_2!"
    assert written("a dog", three) == "a dog"
    assert written("a <cat>", three.model_copy(update={"vectors": 1})) == "a <cat>"
