"""Optimizers against their papers in fp64 NumPy; updates that are skipped; state that goes on bit for bit."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusion_api.training import Optimizer
from diffusion_trainer import hiding
from diffusion_trainer.errors import BadConfig, CheckpointUnsupported
from diffusion_trainer.optim import (
    Group,
    LossScale,
    OptimizerState,
    apply_update,
    load_optimizer,
    make_optimizer,
    optimizer_state,
)

CPU = torch.device("cpu")
NAMES = ["AdamW", "AdamW8bit", "Adafactor", "Prodigy", "Lion"]
WIDTHS = {"AdamW8bit": 1400}
"""4200 elements: 16 blocks of 256 and a part of one. Its state of what is smaller than 4096 is not of 8 bits."""


def _problem(seed=0, width=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.nn.Parameter(torch.randn(3, width, generator=generator)),
        "b": torch.nn.Parameter(torch.randn(4, generator=generator)),
    }


def _made(parameters, **settings):
    return make_optimizer([Group(parameters)], Optimizer(**settings))


def _rate(step):
    return 0.01 * (step + 1)


def _train(parameters, optimizer, steps, clip=1.0, scale=None):
    for step in steps:
        loss = sum((p * (step + 1) - 0.5).square().sum() for p in parameters.values())
        (loss if scale is None else loss * scale.value).backward()
        apply_update(optimizer, learning_rate=_rate(step), max_grad_norm=clip, loss=loss.detach(), scale=scale)


def _by_hand(values, steps, rule, clip=None):
    """Minimise the same in fp64; `rule(step, values, gradients)` returns the new values."""
    values = dict(values)
    for step in steps:
        gradients = {k: 2 * (x * (step + 1) - 0.5) * (step + 1) for k, x in values.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        values = rule(step, values, {k: g * factor for k, g in gradients.items()})
    return values


def _assert_like_by_hand(settings, rule, clip=None, rtol=1e-5):
    parameters = _problem()
    start = {k: p.detach().double().numpy() for k, p in parameters.items()}
    wanted = _by_hand(start, range(5), rule, clip=clip)
    _train(parameters, _made(parameters, **settings), range(5), clip)
    for name, parameter in parameters.items():
        assert np.abs(wanted[name] - start[name]).max() > 1e-3
        np.testing.assert_allclose(parameter.detach().numpy(), wanted[name], rtol=rtol, atol=1e-6)


def _decay(name):
    return 0.1 if name == "a" else 0.0  # "b" has one dimension, as biases and the scales of norms have


@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_adamw_with_clipping(clip):
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    m, v = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}

    def rule(step, values, gradients):
        for k, g in gradients.items():
            m[k], v[k] = 0.8 * m[k] + 0.2 * g, 0.95 * v[k] + 0.05 * g**2
            update = m[k] / (1 - 0.8 ** (step + 1)) / (np.sqrt(v[k] / (1 - 0.95 ** (step + 1))) + 1e-8)
            values[k] = values[k] * (1 - _rate(step) * _decay(k)) - _rate(step) * update
        return values

    _assert_like_by_hand({"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}, rule, clip)


def _code(*, signed):
    """Dettmers, arXiv 1511.04561, section 2.1: a decimal exponent in unary, the rest of the bits a linear fraction."""
    code = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        code += [*means, *(-means if signed else [])]
    return np.sort(code)


def _rounded(moments, code):
    """Round to the nearest of the code's values, relative to the largest magnitude of each 256."""
    found = []
    for block in np.split(moments.ravel(), range(256, moments.size, 256)):
        largest = np.abs(block).max()
        found.append(code[np.abs(block[:, None] / largest - code).argmin(1)] * largest)
    return np.concatenate(found).reshape(moments.shape)


def test_adamw_of_8_bits():
    """Dettmers et al., arXiv 2110.02861: Adam in fp32, whose moments are rounded after each step, in blocks."""
    parameters = _problem(width=WIDTHS["AdamW8bit"])
    start = {k: p.detach().double().numpy() for k, p in parameters.items()}
    codes = (_code(signed=True), _code(signed=False))

    def rule(*, rounds):
        m, v = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}

        def step_by_hand(step, values, gradients):
            for k, g in gradients.items():
                m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
                update = m[k] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[k] / (1 - 0.999 ** (step + 1))) + 1e-8)
                values[k] = values[k] * (1 - _rate(step) * _decay(k)) - _rate(step) * update
                if rounds and g.size >= 4096:
                    m[k], v[k] = _rounded(m[k], codes[0]), _rounded(v[k], codes[1])
            return values

        return step_by_hand

    wanted, exact = (_by_hand(start, range(5), rule(rounds=rounds)) for rounds in (True, False))
    _train(parameters, _made(parameters, name="AdamW8bit", weight_decay=0.1), range(5), clip=None)
    np.testing.assert_allclose(parameters["b"].detach().numpy(), exact["b"], rtol=1e-5, atol=1e-6)
    found = parameters["a"].detach().numpy()
    # Some moments halfway between two values of the code are rounded to the other one by bitsandbytes.
    assert np.mean(np.abs(found - wanted["a"]) < 1e-5) > 0.9
    np.testing.assert_allclose(found, wanted["a"], atol=0.01)
    assert np.mean(np.abs(found - exact["a"]) < 1e-5) < 0.2  # it is another computation than that in fp32


def test_lion():
    """Chen et al., arXiv 2302.06675, algorithm 2: the sign of one average moves the weights, another one is kept."""
    m = {"a": 0.0, "b": 0.0}

    def rule(step, values, gradients):
        for k, g in gradients.items():
            update = np.sign(0.9 * m[k] + 0.1 * g)
            values[k] = values[k] - _rate(step) * (update + _decay(k) * values[k])
            m[k] = 0.99 * m[k] + 0.01 * g
        return values

    _assert_like_by_hand({"name": "Lion", "weight_decay": 0.1}, rule)


def test_adafactor():
    """Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5, with an absolute learning rate."""
    rows, columns, v = 0.0, 0.0, 0.0

    def rule(step, values, gradients):
        nonlocal rows, columns, v
        beta = 1 - (step + 1) ** -0.8
        a, b = (gradients[k] ** 2 + 1e-30 for k in "ab")
        rows, columns = beta * rows + (1 - beta) * a.mean(1), beta * columns + (1 - beta) * a.mean(0)
        v = beta * v + (1 - beta) * b
        squares = {"a": np.outer(rows, columns) / rows.mean(), "b": v}
        for k, square in squares.items():
            update = gradients[k] / np.sqrt(square)
            update /= max(1.0, math.sqrt((update**2).mean()))
            values[k] = values[k] - _rate(step) * (update + _decay(k) * values[k])
        return values

    _assert_like_by_hand({"name": "Adafactor", "weight_decay": 0.1}, rule)


def test_prodigy():
    """Mishchenko and Defazio, arXiv 2306.06101, algorithm 4, with Adam's bias correction and their safeguard."""
    # In fp64: its first steps are a millionth of the weights, which fp32 rounds to a tenth.
    parameters = {k: torch.nn.Parameter(p.detach().double()) for k, p in _problem().items()}
    values = {k: p.detach().clone().numpy() for k, p in parameters.items()}
    start = dict(values)
    d, r, beta3 = 1e-6, 0.0, math.sqrt(0.999)
    m, v, s = (dict.fromkeys("ab", 0.0) for _ in range(3))
    optimizer = _made(parameters, name="Prodigy", weight_decay=0.1)
    for step in range(120):
        loss = sum((p - 0.5).abs().sum() for p in parameters.values())
        loss.backward()
        apply_update(optimizer, learning_rate=1.0, max_grad_norm=None, loss=loss.detach())

        rate, old = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1)), d
        gradients = {k: np.sign(x - 0.5) for k, x in values.items()}
        r *= beta3
        for k, g in gradients.items():
            r += d / 1e-6 * d * rate * (g * (start[k] - values[k])).sum()
            m[k] = 0.9 * m[k] + 0.1 * d * g
            v[k] = 0.999 * v[k] + 0.001 * d**2 * g**2
            s[k] = beta3 * s[k] + d / 1e-6 * d * g
        d = max(d, r / sum(np.abs(x).sum() for x in s.values()))
        for k, x in values.items():
            values[k] = x * (1 - _decay(k) * old * rate) - old * rate * m[k] / (np.sqrt(v[k]) + d * 1e-8)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), values[name], rtol=1e-3, atol=1e-4)
    assert optimizer.param_groups[0]["d"] == pytest.approx(d, rel=1e-3)
    assert d > 1e-3  # it has grown a thousandfold


def test_each_group_has_its_learning_rate_and_may_have_no_decay():
    first, second = _problem(), _problem()
    groups = [Group({"a": first["a"]}), Group({"x": second["a"]}, lr_scale=0.5, decayed=False)]
    optimizer = make_optimizer(groups, Optimizer(name="Lion", weight_decay=0.1))
    before = first["a"].detach().clone()
    for p in (first["a"], second["a"]):
        p.grad = torch.ones_like(p)
    apply_update(optimizer, learning_rate=0.1, max_grad_norm=None, loss=torch.tensor(1.0))
    torch.testing.assert_close(first["a"], before * (1 - 0.1 * 0.1) - 0.1)
    torch.testing.assert_close(second["a"], before - 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_batched_kernels_get_few_weights_at_a_time_and_no_other_bits(monkeypatch, name):
    """Their temporaries are as large as all weights of a group: 10 GB for the whole of SDXL."""
    found = []
    for at_most in (10**9, 4 * 4):
        monkeypatch.setattr("diffusion_trainer.fitting.PART_BYTES", at_most)
        parameters = _problem() | {f"c{i}": p for i, p in enumerate(_problem(1).values())}
        optimizer = _made(parameters, name=name, weight_decay=0.1)
        _train(parameters, optimizer, range(6))
        found.append((parameters, [[p.numel() for p in group["params"]] for group in optimizer.param_groups]))
    (whole, _), (parts, sizes) = found
    assert sizes == ([[6], [6], [4], [4]] if name in {"Prodigy", "Lion"} else [[6, 6], [4, 4]])
    for k, p in whole.items():
        assert torch.equal(p, parts[k])


def test_prodigy_refuses_several_learning_rates():
    groups = [Group({"a": _problem()["a"]}), Group({"b": _problem()["a"]}, lr_scale=0.5)]
    with pytest.raises(BadConfig, match=r"textEncoder\.learningRate"):
        make_optimizer(groups, Optimizer(name="Prodigy"))


@pytest.mark.parametrize(
    ("name", "library"),
    [("Prodigy", "pytorch_optimizer"), ("Lion", "pytorch_optimizer"), ("AdamW8bit", "bitsandbytes")],
)
def test_a_missing_library_is_named_with_a_remedy(monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(hiding, "_NAME", "a library that is not there")
    with pytest.raises(BadConfig, match=rf"optimizer\.name is {name}.*lacks {library.replace('_', '.')}.*use AdamW"):
        make_optimizer([Group(_problem())], Optimizer(name=name))


@pytest.mark.nightly
def test_other_libraries_do_not_import_bitsandbytes_and_the_trainer_can():
    """In an interpreter of its own; without hiding it, diffusers would have imported it."""
    program = (
        "import diffusion_trainer, sys; from diffusers.models.modeling_utils import ModelMixin\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('bitsandbytes') is None and not sys.modules['bitsandbytes']\n"
        "from diffusion_trainer.hiding import import_bitsandbytes\n"
        "assert import_bitsandbytes().optim.AdamW8bit"
    )
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)


# --- updates ---


def test_the_norm_is_that_before_clipping():
    parameters = {"a": torch.nn.Parameter(torch.tensor([3.0, 4.0]))}
    optimizer = _made(parameters)
    (parameters["a"].square().sum() / 2).backward()
    update = apply_update(optimizer, learning_rate=0.1, max_grad_norm=0.1, loss=torch.tensor(12.5))
    assert (update.norm.item(), update.skipped.item(), update.broken.item()) == (5.0, False, False)
    assert parameters["a"].grad is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_a_step_without_numbers_changes_nothing_at_all(name, loss, gradient):
    straight, disturbed = (_problem(width=WIDTHS.get(name, 2)) for _ in range(2))
    optimizers = [_made(straight, name=name), _made(disturbed, name=name)]
    _train(straight, optimizers[0], range(4))
    _train(disturbed, optimizers[1], range(2))
    for p in disturbed.values():
        p.grad = torch.ones_like(p)
    disturbed["b"].grad[1] = gradient
    update = apply_update(optimizers[1], learning_rate=0.1, max_grad_norm=1.0, loss=torch.tensor(loss))
    assert update.skipped.item()
    assert update.broken.item()
    assert disturbed["b"].grad is None
    _train(disturbed, optimizers[1], range(2, 4))
    for k, p in straight.items():
        assert torch.equal(p, disturbed[k])


def test_the_loss_scale_changes_nothing_but_the_range():
    plain, scaled = _problem(), _problem()
    _train(plain, _made(plain), range(5))
    _train(scaled, _made(scaled), range(5), scale=LossScale(CPU))
    for k, p in plain.items():
        assert torch.equal(p, scaled[k])  # a power of two is exact


def test_an_overflow_halves_the_scale_and_is_nobodys_fault():
    parameters, scale = _problem(), LossScale(CPU)
    optimizer = _made(parameters)

    def overflow(loss=1.0):
        for p in parameters.values():
            p.grad = torch.full_like(p, math.inf)
        return apply_update(optimizer, learning_rate=0.1, max_grad_norm=1.0, loss=torch.tensor(loss), scale=scale)

    for halvings in range(16):
        assert scale.value.item() == 2.0 ** (16 - halvings)
        update = overflow()
        assert (update.skipped.item(), update.broken.item()) == (True, False)
    assert overflow().broken.item()  # at 1 it cannot be the scale
    assert scale.value.item() == 1
    assert overflow(math.nan).broken.item()


def test_a_loss_that_is_no_number_is_broken_at_any_scale():
    parameters = _problem()
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    loss = torch.tensor(math.nan)
    update = apply_update(_made(parameters), learning_rate=0.1, max_grad_norm=1.0, loss=loss, scale=LossScale(CPU))
    assert update.broken.item()


def test_the_scale_grows_after_two_thousand_calm_steps_and_survives_a_checkpoint():
    scale, calm = LossScale(CPU), torch.tensor(False)
    for _ in range(1999):
        scale.note(calm)
    again = LossScale(CPU)
    again.restore({name: tensor.clone() for name, tensor in scale.tensors().items()})
    assert again.value.item() == 2.0**16
    again.note(calm)
    assert again.value.item() == 2.0**17
    assert again.tensors()["calm"].item() == 0


# --- state ---


def _copied(state):
    return OptimizerState({k: t.clone() for k, t in state.tensors.items()}, json.loads(json.dumps(state.scalars)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_restored_optimizer_goes_on_bit_for_bit(name, at):
    straight, first = (_problem(width=WIDTHS.get(name, 2)) for _ in range(2))
    _train(straight, _made(straight, name=name), range(6))

    optimizer = _made(first, name=name)
    _train(first, optimizer, range(at))
    saved = _copied(optimizer_state(optimizer, first))

    second = {k: torch.nn.Parameter(p.detach().clone()) for k, p in first.items()}
    restored = _made(second, name=name)
    load_optimizer(restored, second, saved)
    _train(second, restored, range(at, 6))
    for k, p in straight.items():
        assert torch.equal(p, second[k])


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("AdamW", {"a/step", "a/exp_avg", "a/exp_avg_sq", "b/step", "b/exp_avg", "b/exp_avg_sq"}),
        (
            "AdamW8bit",
            {f"a/{entry}{i}" for entry in ("state", "qmap", "absmax") for i in (1, 2)} | {"b/state1", "b/state2"},
        ),
        ("Lion", {"a/exp_avg", "b/exp_avg"}),
        ("Adafactor", {"a/RMS", "a/exp_avg_sq_row", "a/exp_avg_sq_col", "b/RMS", "b/exp_avg_sq"}),
    ],
)
def test_state_has_the_names_of_its_parameters(name, entries):
    parameters = _problem(width=WIDTHS.get(name, 2))
    optimizer = _made(parameters, name=name)
    assert optimizer_state(optimizer, parameters).tensors == {}
    _train(parameters, optimizer, range(1))
    assert set(optimizer_state(optimizer, parameters).tensors) == entries


def test_the_order_of_parameters_in_groups_does_not_matter():
    first, second = _problem(), _problem()
    optimizer = _made(first)
    _train(first, optimizer, range(2))
    saved = _copied(optimizer_state(optimizer, first))
    turned = make_optimizer([Group({"b": second["b"]}), Group({"a": second["a"]})], Optimizer())
    load_optimizer(turned, second, saved)
    for name, p in second.items():
        assert torch.equal(turned.state[p]["exp_avg"], saved.tensors[f"{name}/exp_avg"])


def test_a_parameter_without_gradients_has_no_state():
    parameters, again = _problem(), _problem()
    optimizer, restored = _made(parameters), _made(again)
    parameters["a"].square().sum().backward()
    apply_update(optimizer, learning_rate=0.1, max_grad_norm=1.0, loss=torch.tensor(1.0))
    saved = _copied(optimizer_state(optimizer, parameters))
    assert saved.scalars["untouched"] == ["b"]
    load_optimizer(restored, again, saved)
    assert set(restored.state) == {again["a"]}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("a/exp_avg"), "lacks a/exp_avg"),
        (lambda t: t.update({"a/other": torch.zeros(1)}), "holds a/other"),
        (lambda t: t.update({"c/exp_avg": torch.zeros(1)}), "holds c and 0 more"),
        (lambda t: t.update({"a/exp_avg": torch.zeros(2, 3)}), r"a/exp_avg is \(\(2, 3\)"),
        (lambda t: t.update({"a/exp_avg": torch.zeros(3, 2, dtype=torch.bfloat16)}), "bfloat16"),
    ],
)
def test_state_of_another_optimizer_is_refused(change, text):
    parameters = _problem()
    optimizer = _made(parameters)
    _train(parameters, optimizer, range(1))
    saved = _copied(optimizer_state(optimizer, parameters))
    change(saved.tensors)
    again = _problem()
    with pytest.raises(CheckpointUnsupported, match=text):
        load_optimizer(_made(again), again, saved)


def test_looking_for_the_expected_state_leaves_the_optimizer_alone():
    parameters = _problem()
    for name in NAMES:
        optimizer = _made(parameters, name=name)
        load_optimizer(optimizer, parameters, optimizer_state(optimizer, parameters))
        assert not optimizer.state
        assert all(torch.equal(p, q) for p, q in zip(parameters.values(), _problem().values(), strict=True))
