"""Memory of activations: peak bytes alive in one micro-step, beside weights and gradients, of the published networks.

    python -m bench.trainer.activations [--only SD1]

Writes bench/results/activations.json and, from it, crds/diffusion_api/memory_activations.py.

How: the real diffusers classes (and PEFT adapters, and transformers' text encoders) run forward and backward at real
shapes on fake tensors, which have sizes but no data. Each storage that an operator makes is counted while it lives.
What a GPU does otherwise than the CPU's dispatcher is set here: under autocast CUDA normalises in fp32, and fused
attention keeps query, key, value, result and one fp32 number per query (FlashAttention, arXiv 2205.14135) instead of
the matrix. Not counted: CUDA's context, libraries' workspaces, the allocator's rounding; the estimate has reserves for
them.

Bytes are linear in what varies: fixed + micro_batch * (per_image + per_latent * latents), latents being the positions
of the latent image (pixels, for UNet2D). Three points settle the line; a fourth one checks it and is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from testkit import architectures

RESULTS = Path(__file__).parents[1] / "results" / "activations.json"
TABLE = Path(__file__).parents[2] / "crds" / "diffusion_api" / "memory_activations.py"
POINTS = ((1, 64), (1, 128), (2, 64))
CHECKED = (3, 96)
TEXT_POINTS = ((1, 64), (16, 64), (32, 64))
LORA_RANK = 16
ATTENTION = {
    "UNet": ["to_k", "to_out.0", "to_q", "to_v"],
    "MMDiT": ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"],
}
FEED_FORWARD = ["net.0.proj", "net.2"]
_CASTS = ("group_norm", "layer_norm")


@dataclass(frozen=True)
class Case:
    """One way of training one network."""

    architecture: str
    trained: str  # Adapter | Denoiser | TextEncoders | Nothing (encoding and decoding of images by the VAE)
    precision: str  # BF16 | FP32
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return "/".join((self.architecture, self.trained, self.precision, *(["checkpointing"] * self.checkpointing)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive, among those made or seen while it is on."""

    def __init__(self, *, without: Iterable[Tensor]) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0
        for tensor in without:
            self.count(tensor)
        self._before = self.now

    @property
    def most(self) -> int:
        """The most bytes that lived at once, beside those of the tensors that were to be left out."""
        return self.peak - self._before

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size, key = storage.nbytes(), storage._cdata  # noqa: SLF001 - what tells storages apart
        known = self._seen.get(key)
        if known is not None and known() is not None:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self.count(one)
        return made


class FusedAttention(torch.autograd.Function):
    """The memory of fused attention; no numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        row = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row)
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_rest = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (one.to(torch.bfloat16) for one in (query, key, value))
    if not torch.is_grad_enabled():
        return query.new_empty((*query.shape[:-1], value.shape[-1]))
    result: Tensor = FusedAttention.apply(query, key, value)
    return result


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Use CUDA's autocast rules for norms, and fused attention."""
    originals = {name: getattr(functional, name) for name in (*_CASTS, "scaled_dot_product_attention")}

    def in_fp32(name: str) -> Callable[..., Tensor]:
        def cast(value: Tensor, shape: Any, *rest: Any, **named: Any) -> Tensor:
            floats = list(rest)
            if torch.is_autocast_enabled("cpu"):
                value = value.float()
                floats = [one.float() if isinstance(one, Tensor) else one for one in rest]
                named = {key: one.float() if isinstance(one, Tensor) else one for key, one in named.items()}
            result: Tensor = originals[name](value, shape, *floats, **named)
            return result

        return cast

    try:
        for name in _CASTS:
            setattr(functional, name, in_fp32(name))
        functional.scaled_dot_product_attention = _attention
        yield
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)


def measure(case: Case) -> dict[str, Any]:
    """Return what the points of one case need, the line through them, and how far off it is at the checked one."""
    with FakeTensorMode(), as_on_cuda():
        step = _STEPS[case.trained](case)
        network = step.network
        for parameter in network.parameters():  # gradients are there already, as in every micro-step but the first
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        kept = [one for parameter in network.parameters() for one in (parameter.data, parameter.grad)]
        kept = [one for one in (*kept, *network.buffers()) if one is not None]
        # One case of each network is checked at a fourth point.
        checked = [CHECKED] if case.precision == "BF16" and not case.checkpointing else []
        points = TEXT_POINTS if case.trained == "TextEncoders" else (*POINTS, *checked)
        bytes_at = {point: peak(step.run, *point, kept=kept) for point in points}
    line = _text_line(bytes_at) if case.trained == "TextEncoders" else _line(bytes_at)
    images, side = points[-1]
    expected = line["fixed"] + images * (line["per_image"] + line["per_latent"] * side * side)
    return {
        "case": case.name,
        **{name: round(value) for name, value in line.items()},
        "bytes": {f"{images}x{side}x{side}": bytes_at[images, side] for images, side in bytes_at},
        "error_of_line_percent": round(100 * (expected / bytes_at[points[-1]] - 1), 2),
    }


def _line(bytes_at: Mapping[tuple[int, int], int]) -> dict[str, float]:
    (small, large), twice = ((bytes_at[1, side], side * side) for side in (64, 128)), bytes_at[2, 64]
    per_latent = (large[0] - small[0]) / (large[1] - small[1])
    per_image = twice - small[0] - per_latent * small[1]
    return {"fixed": small[0] - per_image - per_latent * small[1], "per_image": per_image, "per_latent": per_latent}


def _text_line(bytes_at: Mapping[tuple[int, int], int]) -> dict[str, float]:
    """Return an upper bound: with few captions the gradient of the token embeddings is the peak, later activations."""
    one, many, more = (bytes_at[point] for point in TEXT_POINTS)
    per_image = (more - many) / (TEXT_POINTS[2][0] - TEXT_POINTS[1][0])
    return {"fixed": float(one), "per_image": per_image, "per_latent": 0.0}


@dataclass(frozen=True)
class Step:
    """A micro-step of so many images, whose latents have so many positions on a side, on a network."""

    network: nn.Module
    run: Callable[[int, int], None]


def peak(run: Callable[[int, int], None], images: int, side: int, *, kept: Iterable[Tensor]) -> int:
    """Return the most bytes alive during a micro-step, without those of `kept`."""
    with LiveBytes(without=kept) as live:
        run(images, side)
        return live.most


def on_meta(make: Callable[[], Any]) -> Any:
    """Return what `make` builds, on the meta device: a fake tensor cannot be converted within a module."""
    with unset_fake_temporarily(), torch.device("meta"):
        return make()


def faked(network: Any) -> Any:
    """Give a network fake parameters and buffers on the CPU in place of those on the meta device."""
    for module in network.modules():
        for name, one in module.named_parameters(recurse=False):
            fake = torch.empty(one.shape, dtype=one.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=one.requires_grad))
        for name, one in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(one.shape, dtype=one.dtype))
    return network


def _denoiser_step(case: Case) -> Step:
    name, low = case.architecture, case.precision == "BF16"

    def make() -> Any:
        network = architectures.denoiser(name).train()
        if case.trained == "Adapter":
            network.requires_grad_(requires_grad=False)
            network.to(torch.bfloat16 if low else torch.float32)
            add_adapter(network, name)
        return network

    network = faked(on_meta(make))
    if case.checkpointing:
        network.enable_gradient_checkpointing()
    frozen = torch.bfloat16 if low and case.trained == "Adapter" else torch.float32
    channels = architectures.LATENT_CHANNELS.get(name, 4)

    def run(images: int, side: int) -> None:
        noisy = torch.empty(images, channels, side, side)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            predicted = network(noisy, timestep=torch.empty(images), **_conditions(name, images, frozen)).sample
        ((predicted.float() - torch.empty_like(noisy)) ** 2).mean().backward()

    return Step(network, run)


def _conditions(name: str, images: int, dtype: torch.dtype) -> dict[str, Any]:
    if name == "UNet2D":
        return {}
    text = torch.empty(images, architectures.TEXT_LENGTHS[name], architectures.TEXT_WIDTHS[name], dtype=dtype)
    if name == "SDXL":
        added = {"text_embeds": torch.empty(images, 1280), "time_ids": torch.empty(images, 6)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
    if name.startswith("SD3"):
        return {"encoder_hidden_states": text, "pooled_projections": torch.empty(images, 2048)}
    return {"encoder_hidden_states": text}


def add_adapter(network: nn.Module, architecture: str, *, rank: int = LORA_RANK, targets: str = "All") -> None:
    """Put fp32 adapters on a network, as the trainer does."""
    from peft import LoraConfig, inject_adapter_in_model

    names = ATTENTION["MMDiT" if architecture.startswith("SD3") else "UNet"]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names + (FEED_FORWARD if targets == "All" else []))
    inject_adapter_in_model(config, network, "default")
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _text_step(case: Case) -> Step:
    low = case.precision == "BF16"
    encoders: list[Any] = [
        faked(one.train())
        for one in on_meta(lambda: architectures.text_encoders(case.architecture))
        if type(one).__name__.startswith("CLIP")  # T5 is never part of a step
    ]
    for encoder in encoders:
        if case.checkpointing:
            encoder.gradient_checkpointing_enable()
    together = nn.ModuleList(encoders)

    def run(images: int, side: int) -> None:
        del side  # captions have one length
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            outs = [one(torch.empty(images, 77, dtype=torch.int64)).last_hidden_state for one in encoders]
        sum(out.float().mean() for out in outs).backward()

    return Step(together, run)


def _coding_step(case: Case) -> Step:
    """Return the decoding of one image after another; encoding needs less."""
    vae = faked(on_meta(lambda: architectures.vae(case.architecture).requires_grad_(requires_grad=False)))

    def run(images: int, side: int) -> None:
        with torch.no_grad():
            if case.trained == "Decoding":
                vae.decode(torch.empty(images, architectures.LATENT_CHANNELS.get(case.architecture, 4), side, side))
            else:
                vae.encode(torch.empty(images, 3, 8 * side, 8 * side))

    return Step(vae, run)


_STEPS: dict[str, Callable[[Case], Step]] = {
    "Adapter": _denoiser_step,
    "Denoiser": _denoiser_step,
    "TextEncoders": _text_step,
    "Encoding": _coding_step,
    "Decoding": _coding_step,
}


def cases(only: str | None) -> list[Case]:
    """Return every case that the estimate knows, slow ones first."""
    found = []
    for name in reversed(architectures.DENOISERS):
        if only not in {None, name}:
            continue
        for trained in ("Denoiser", *(["Adapter"] * (name != "UNet2D"))):
            found += [Case(name, trained, p, c) for p in ("BF16", "FP32") for c in (False, True)]
        if name in {"SD1", "SD2", "SDXL", "SD3-medium"}:  # SD3.5 has the text encoders of SD3
            found += [Case(name, "TextEncoders", p, c) for p in ("BF16", "FP32") for c in (False, True)]
        if name in {"SD1", "SD3-medium"}:  # one for 4 and one for 16 channels
            found += [Case(name, "Encoding", "FP32"), Case(name, "Decoding", "FP32")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(architectures.DENOISERS))
    options = parser.parse_args()
    rows = []
    for case in cases(options.only):
        rows.append(measure(case))
        print(json.dumps(rows[-1]), flush=True)
    if not options.only:
        write(rows)


def write(rows: Iterable[dict[str, Any]]) -> None:
    """Write the results of all cases."""
    result: dict[str, Any] = {
        "what": "bytes: peak bytes alive in one micro-step beside weights and gradients: "
        "fixed + micro_batch * (per_image + per_latent * latents)",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"no GPU, {platform.machine()}: shapes only",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
        "rows": sorted(rows, key=lambda row: row["case"]),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    TABLE.write_text(table(result["rows"]))


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the module with the lines of all cases."""
    lines = [f'    "{row["case"]}": ({row["fixed"]}, {row["per_image"]}, {row["per_latent"]}),' for row in rows]
    return "\n".join(
        [
            '"""Written by bench/trainer/activations.py from bench/results/activations.json, which says with what."""',
            "",
            "ACTIVATIONS: dict[str, tuple[int, int, int]] = {",
            *lines,
            "}",
            '"""Bytes by case: fixed, per image, per image and latent position."""',
            "",
        ]
    )


if __name__ == "__main__":
    main()
