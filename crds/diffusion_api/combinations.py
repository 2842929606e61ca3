"""What goes together: methods and families, what is trained and file formats; and why the rest does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from diffusion_api.meta import Cel
from diffusion_api.method import Method
from diffusion_api.model import Family, Model
from diffusion_api.training import SNR_GAMMA, Objective

TEXT_TO_IMAGE: tuple[Family, ...] = ("SD1", "SD2", "SDXL", "SD3")
FAMILIES: dict[Method, tuple[Family, ...]] = {
    "LoRA": TEXT_TO_IMAGE,
    "DreamBooth": TEXT_TO_IMAGE,
    "FineTune": TEXT_TO_IMAGE,
    "FromScratch": TEXT_TO_IMAGE,
    "Unconditional": ("UNet2D",),
    "TextualInversion": ("SD1", "SD2", "SDXL"),
}
"""The families that a method trains."""

Kind = Literal["Adapter", "Weights", "Embedding"]
"""What is trained, and comes out: low-rank adapters, weights of the model itself, or the vectors of a new word."""
Format = Literal["Diffusers", "Kohya", "SingleFile"]
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "Adapter": ("Diffusers", "Kohya", "SingleFile"),
    "Weights": ("Diffusers", "SingleFile"),
    "Embedding": ("Diffusers", "Kohya"),
}
"""The formats that each can be written in; an unconditional model has one only."""

_NO_FORMAT: dict[tuple[Kind, Format], str] = {
    ("Weights", "Kohya"): "a format for adapters and embeddings, and this method trains the model itself: use "
    "SingleFile",
    ("Embedding", "SingleFile"): "a whole model, and this method leaves the model as it was: use Kohya",
}
_NO_UNCONDITIONAL = "there is one published format for an unconditional model: use Diffusers"
_CEL_ADAPTER_NONE = "has(self.dreamBooth) && has(self.dreamBooth.adapter) && self.dreamBooth.adapter == 'None'"
_CEL_KIND: dict[Kind, str] = {
    "Weights": f"self.method in ['FineTune', 'FromScratch'] || ({_CEL_ADAPTER_NONE})",
    "Embedding": "self.method == 'TextualInversion'",
}

_WORDLESS = "it has no text: use method Unconditional, or a family with text"
_WORDS = "it draws from text: use a model of family UNet2D, or another method"
_NO_TEXT: dict[Family, str] = {
    "UNet2D": "family UNet2D has no text encoder: use false",
}
_JOINT = "family SD3 has joint attention, and no cross-attention: use Attention"
_T5 = "its T5 would have to learn the word, too, and no program loads such a file: use method LoRA"


_NOISY = ("Epsilon", "VPrediction", "Sample")
_FLOW = "family SD3 is a flow and stays one: use Auto"
_NO_FLOW = "only family SD3 is a flow: use Auto"
_ENDS_IN_NOISE = "family SD3 is a flow, which ends in nothing but noise as it is: leave it out"
_UNWEIGHTED = (
    "family SD3 is a flow, for which min-SNR weights are not defined, and its loss is not weighted: leave it out"
)
_NO_SHIFT = "only family SD3, which is a flow, has a shift: leave it out"
_TEXTLESS = "family UNet2D has no text encoder: leave it out"
_PIXELS = "family UNet2D works on pixels and has no VAE: leave it out"


def unfit(method: Method, family: Family) -> str | None:
    """Return why a method does not train a family, and what to do instead; None where it does."""
    if family in FAMILIES[method]:
        return None
    if family == "UNet2D":
        return _WORDLESS
    return _WORDS if method == "Unconditional" else _T5


def misfits(
    method: Method, family: Family, *, model: Model, parts: str | None, objective: Objective
) -> Iterator[tuple[str, object, str]]:
    """Yield (path, value, reason and remedy) of what a job asks for and its family cannot do."""
    reason = unfit(method, family)
    if reason is not None:
        yield "method", method, f"method {method} cannot train family {family}: {reason}"
        return
    if model.text_encoder.train and family in _NO_TEXT:
        yield "model.textEncoder.train", True, _NO_TEXT[family]
    if model.text_encoder.source is not None and family == "UNet2D":
        yield "model.textEncoder.source", model.text_encoder.source, _TEXTLESS
    if model.vae is not None and family == "UNet2D":
        yield "model.vae", model.vae, _PIXELS
    if parts == "CrossAttention" and family == "SD3":
        yield "fineTune.parts", parts, _JOINT
    yield from _objectives(family, objective)


def _objectives(family: Family, objective: Objective) -> Iterator[tuple[str, object, str]]:
    predicted = objective.prediction_type
    if family == "SD3" and predicted in _NOISY:
        yield "training.objective.predictionType", predicted, _FLOW
    if family != "SD3" and predicted == "Flow":
        yield "training.objective.predictionType", predicted, _NO_FLOW
    if family != "SD3" and objective.shift is not None:
        yield "training.objective.shift", objective.shift, _NO_SHIFT
    if family == "SD3" and objective.snr_gamma not in (None, SNR_GAMMA):
        yield "training.objective.snrGamma", objective.snr_gamma, _UNWEIGHTED
    if family == "SD3" and objective.zero_terminal_snr:
        yield "training.objective.zeroTerminalSNR", True, _ENDS_IN_NOISE


def unwritable(method: Method, kind: Kind, formats: Iterable[Format]) -> Iterator[tuple[Format, str]]:
    """Yield each format that what a job trains cannot be written in, with the reason and the remedy."""
    for name in formats:
        if method == "Unconditional" and name != "Diffusers":
            yield name, _NO_UNCONDITIONAL
        elif name not in FORMATS[kind]:
            yield name, _NO_FORMAT[kind, name]


def fit_rules() -> list[Cel]:
    """Return the CEL rules that say the same of a job whose family is not left to the model."""
    known = "!has(self.model.family) || self.model.family == 'Auto' || "
    pairs = (f"(self.method == '{method}' && self.model.family in {list(names)})" for method, names in FAMILIES.items())
    trains_text = "has(self.model.textEncoder) && has(self.model.textEncoder.train) && self.model.textEncoder.train"
    return [
        Cel(
            known + " || ".join(pairs),
            '"method " + self.method + " cannot train family " + self.model.family + ": " + (self.model.family == '
            f"'UNet2D' ? '{_WORDLESS}' : self.method == 'Unconditional' ? '{_WORDS}' : '{_T5}')",
            expression=True,
            field=".model.family",
        ),
        *(
            Cel(f"{known}self.model.family != '{family}' || !({trains_text})", f"model.textEncoder.train: {reason}")
            for family, reason in _NO_TEXT.items()
        ),
        Cel(
            f"{known}self.model.family != 'SD3' || !has(self.fineTune) || !has(self.fineTune.parts) || "
            "self.fineTune.parts != 'CrossAttention'",
            f"fineTune.parts: {_JOINT}",
        ),
        Cel(
            f"{known}self.model.family != 'UNet2D' || !has(self.model.textEncoder) || "
            "!has(self.model.textEncoder.source)",
            f"model.textEncoder.source: {_TEXTLESS}",
        ),
        Cel(f"{known}self.model.family != 'UNet2D' || !has(self.model.vae)", f"model.vae: {_PIXELS}"),
        *_objective_rules(known),
    ]


def _objective_rules(known: str) -> Iterator[Cel]:
    there = "has(self.training) && has(self.training.objective) && has(self.training.objective"
    predicted = f"{there}.predictionType) && self.training.objective.predictionType"
    at = "training.objective.predictionType"
    yield Cel(f"{known}self.model.family != 'SD3' || !({predicted} in {list(_NOISY)})", f"{at}: {_FLOW}")
    yield Cel(f"{known}self.model.family == 'SD3' || !({predicted} == 'Flow')", f"{at}: {_NO_FLOW}")
    yield Cel(f"{known}self.model.family == 'SD3' || !({there}.shift))", f"training.objective.shift: {_NO_SHIFT}")
    yield Cel(
        f"{known}self.model.family != 'SD3' || !({there}.snrGamma)) || self.training.objective.snrGamma == {SNR_GAMMA}",
        f"training.objective.snrGamma: {_UNWEIGHTED}",
    )
    yield Cel(
        f"{known}self.model.family != 'SD3' || !({there}.zeroTerminalSNR) && self.training.objective.zeroTerminalSNR)",
        f"training.objective.zeroTerminalSNR: {_ENDS_IN_NOISE}",
    )


def format_rules() -> list[Cel]:
    """Return the CEL rules about `output.formats`."""
    reasons = [(name, _CEL_KIND[kind], reason) for (kind, name), reason in _NO_FORMAT.items()]
    reasons += [(name, "self.method == 'Unconditional'", _NO_UNCONDITIONAL) for name in ("Kohya", "SingleFile")]
    return [
        Cel(
            f"!has(self.output.formats) || !('{name}' in self.output.formats) || !({holds})",
            f"output.formats: {name}: {reason}",
            field=".output.formats",
        )
        for name, holds, reason in reasons
    ]
