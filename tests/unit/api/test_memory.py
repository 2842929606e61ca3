"""The memory estimate: numbers by hand, what must grow with what, and what is said of a job that cannot fit."""

import json
from pathlib import Path

import pytest

from diffusion_api.memory import GIB, STATE_BYTES, architecture_of, estimate, largest_micro_batch, too_large
from diffusion_api.memory_activations import ACTIVATIONS
from diffusion_api.memory_reference import ANCHORS, spec_of, trained_gib
from diffusion_api.memory_table import NETWORKS
from diffusion_api.training import Optimizer
from testkit import architectures

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results" / "activations.json"


def need(method="LoRA", family="SD1", *, resolution=512, micro_batch=1, checkpointing=None, **training):
    spec = spec_of(method, resolution, **training)
    return estimate(spec, family=family, micro_batch=micro_batch, checkpointing=checkpointing)


class TestParts:
    def test_full_fine_tuning_of_sd1_by_hand(self):
        parts = need("FineTune", resolution=512, micro_batch=2).parts
        assert parts["weights"] * GIB == pytest.approx(859_520_964 * 4)
        assert parts["gradients"] * GIB == pytest.approx(859_520_964 * 4)
        assert parts["optimizer"] * GIB == pytest.approx(859_520_964 * 8)
        # What autocast copies of the weights (2 bytes each), then two images of 64 x 64 latents.
        assert parts["activations"] == pytest.approx((859.5e6 * 2 + 2 * (7.9e6 + 4096 * 317_323)) / GIB, rel=0.001)
        others = sum(value for name, value in parts.items() if name != "reserve")
        assert parts["reserve"] == pytest.approx(0.9 + 0.05 * others)

    def test_an_adapter_of_rank_4_on_sd1_by_hand(self):
        spec = spec_of("LoRA", 1024).model_copy(update={"lora": None})
        parts = estimate(spec, family="SD1", micro_batch=8).parts
        adapter = 16 * 374_016
        assert parts["weights"] * GIB == pytest.approx(859_520_964 * 2 + adapter * 4)
        assert parts["gradients"] * GIB == pytest.approx(adapter * 4)

    def test_encoding_is_a_moment_of_its_own(self):
        found = need("LoRA", "SD3-medium", resolution=512)
        assert found.peak == "Preparation"
        t5, clips, vae = 4_762_310_656 * 2, (123_650_304 + 694_659_840) * 4, 83_819_683 * 4
        assert found.parts["encoders"] * GIB == pytest.approx(t5 + clips + vae)
        assert found.total_gib == max(found.moments.values())

    def test_every_optimizer_of_the_api_is_known(self):
        names = Optimizer.model_fields["name"].annotation.__args__
        assert set(STATE_BYTES) == set(names)


class TestGrowth:
    @pytest.mark.parametrize("family", [name for name in NETWORKS if name != "UNet2D"])
    @pytest.mark.parametrize("method", ["LoRA", "FineTune"])
    @pytest.mark.parametrize("precision", ["BF16", "FP32"])
    def test_what_must_be_more(self, family, method, precision):
        def training(**more):
            return need(method, family, mixedPrecision=precision, **more).moments["Training"]

        base = training()
        assert training(micro_batch=2) > base
        assert training(resolution=768) > base
        assert training(ema={"enabled": True}) > base
        assert training(optimizer={"name": "Prodigy"}) > base > training(optimizer={"name": "Lion"})
        assert training(checkpointing=True) < base
        assert training(checkpointing=True, gradientCheckpointing="Never") < base
        assert training(gradientCheckpointing="Always") == training(checkpointing=True)

    def test_adapters_on_text_encoders_leave_them_frozen(self):
        spec = spec_of("LoRA", 512)
        encoder = spec.model.text_encoder.model_copy(update={"train": True})
        taught = spec.model_copy(update={"model": spec.model.model_copy(update={"text_encoder": encoder})})
        more, less = (estimate(s, family="SD1", micro_batch=1).moments["Training"] for s in (taught, spec))
        line = ACTIVATIONS["SD1/TextEncoders/BF16"]
        assert (more - less) * GIB == pytest.approx((123_060_480 * 4 + line[0] + line[1]) * 1.05)

    @pytest.mark.parametrize("family", ["SD3-medium", "SD3.5-large"])
    def test_of_the_text_encoders_of_sd3_those_of_clip_are_in_the_steps(self, family):
        clips = 123_650_304 + 694_659_840
        line = ACTIVATIONS["SD3-medium/TextEncoders/BF16"]
        for method, per_parameter in (("LoRA", 4), ("FineTune", 16)):
            spec = spec_of(method, 512)
            encoder = spec.model.text_encoder.model_copy(update={"train": True})
            taught = spec.model_copy(update={"model": spec.model.model_copy(update={"text_encoder": encoder})})
            more, less = (estimate(s, family=family, micro_batch=1).moments for s in (taught, spec))
            added = (more["Training"] - less["Training"]) * GIB
            assert added == pytest.approx((clips * per_parameter + line[0] + line[1]) * 1.05)
            learning = (more["Sampling"] - less["Sampling"]) * GIB if "Sampling" in more else 0
            assert learning in (0, pytest.approx(clips * (per_parameter - 4) * 1.05, abs=1))

    def test_weights_that_are_trained_are_in_fp32_while_the_cache_is_built(self):
        low, whole = (need(method, "SD1").moments["Preparation"] for method in ("LoRA", "FineTune"))
        assert (whole - low) * GIB == pytest.approx(859_520_964 * 2 * 1.05)

    def test_trained_text_encoders_add_up(self):
        spec = spec_of("FineTune", 512)
        encoder = spec.model.text_encoder.model_copy(update={"train": True})
        taught = spec.model_copy(update={"model": spec.model.model_copy(update={"text_encoder": encoder})})
        more = estimate(taught, family="SD1", micro_batch=1).moments["Training"]
        less = estimate(spec, family="SD1", micro_batch=1).moments["Training"]
        assert (more - less) * GIB > 123_060_480 * 16, "weights, gradients and two moments in fp32"

    def test_every_family_method_and_precision_has_an_estimate(self):
        for family in NETWORKS:
            for method in ("LoRA", "FineTune", "FromScratch") if family != "UNet2D" else ("Unconditional",):
                for precision in ("Auto", "BF16", "FP16", "FP32"):
                    for checkpointing in (False, True):
                        found = need(method, family, mixedPrecision=precision, checkpointing=checkpointing)
                        assert 0.9 < found.total_gib < 500


class TestFit:
    def test_the_largest_micro_batch_fits_and_one_more_does_not(self):
        spec = spec_of("LoRA", 1024, batchSize=64)
        found = largest_micro_batch(spec, "SDXL", 80)
        assert 1 < found < 64
        assert estimate(spec, family="SDXL", micro_batch=found).total_gib <= 80
        assert estimate(spec, family="SDXL", micro_batch=found + 1).total_gib > 80

    def test_it_is_at_most_the_batch_and_0_where_nothing_fits(self):
        assert largest_micro_batch(spec_of("LoRA", 512, batchSize=4), "SD1", 80) == 4
        assert largest_micro_batch(spec_of("FineTune", 1024), "SD3.5-large", 80) == 0

    def test_what_may_fit_is_not_refused(self):
        assert too_large(spec_of("LoRA", 512), family="SD1", memory_gib=8) is None
        assert too_large(spec_of("LoRA", 1024), family="SDXL", memory_gib=24) is None
        assert too_large(spec_of("FineTune", 1024), family="SDXL", memory_gib=80) is None

    def test_what_cannot_is_refused_with_numbers_and_remedies(self):
        message = too_large(spec_of("FineTune", 1024), family="SDXL", memory_gib=24)
        assert message is not None
        assert "FineTune of SDXL at 1024 px needs about 46.8 GiB while training (weights 9.6, " in message
        assert "with gradient checkpointing" in message
        assert "has 24 GiB: use method: LoRA, or use a profile with 47 GiB or more per GPU" in message

    def test_remedies_are_true(self):
        spec = spec_of("FineTune", 1024, gradientCheckpointing="Never", mixedPrecision="FP32")
        message = too_large(spec, family="SDXL", memory_gib=48)
        assert message is not None
        assert "set training.gradientCheckpointing: Always" in message
        cured = spec_of("FineTune", 1024, gradientCheckpointing="Always", mixedPrecision="FP32")
        assert estimate(cured, family="SDXL", micro_batch=1).total_gib <= 48


class TestSources:
    def test_the_table_is_what_was_measured(self):
        rows = json.loads(RESULTS.read_text())["rows"]
        measured = {row["case"]: (row["fixed"], row["per_image"], row["per_latent"]) for row in rows}
        assert measured == ACTIVATIONS

    def test_the_lines_are_straight(self):
        rows = json.loads(RESULTS.read_text())["rows"]
        crooked = [row["case"] for row in rows if abs(row["error_of_line_percent"]) > 1]
        # Few captions cost the gradient of the token embeddings, many their activations: the line is above both.
        assert all("TextEncoders" in case for case in crooked)
        assert all(row["error_of_line_percent"] > -1 for row in rows)

    @pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: f"{anchor.architecture}-{anchor.gib}")
    def test_published_measurements_are_met_within_a_third(self, anchor):
        assert trained_gib(anchor) == pytest.approx(anchor.gib, rel=0.33)

    @pytest.mark.parametrize("anchor", ANCHORS[:2], ids=["SD1", "SDXL"])
    def test_those_of_unets_without_checkpointing_within_6_percent(self, anchor):
        assert trained_gib(anchor) == pytest.approx(anchor.gib, rel=0.06)


class TestArchitecture:
    @pytest.mark.parametrize("name", list(NETWORKS))
    def test_a_published_configuration_is_recognised(self, name):
        as_read = json.loads(json.dumps(architectures.DENOISERS[name]))
        assert architecture_of(as_read) == name

    @pytest.mark.parametrize("change", [{"cross_attention_dim": 512}, {"in_channels": 9}, {"layers_per_block": 1}])
    def test_another_one_is_not(self, change):
        assert architecture_of(json.loads(json.dumps(architectures.DENOISERS["SD1"])) | change) is None
        assert architecture_of({}) is None
