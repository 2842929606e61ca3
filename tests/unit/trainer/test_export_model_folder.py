"""What an exported model says of its noise schedule, read by diffusers, and again by us."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from diffusion_api.job import TrainerSpec
from diffusion_api.method import LoRA
from diffusion_api.training import Objective as Asked
from diffusion_trainer import tensorfile
from diffusion_trainer.export.kohya_format import _training_metadata
from diffusion_trainer.export.model_folder import _correct_scheduler
from diffusion_trainer.export.single_file import _markers
from diffusion_trainer.models.loading import load_discrete_process
from diffusion_trainer.models.single_file.configurations import _scheduler
from diffusion_trainer.objective import DiscreteProcess, FlowProcess, process_as_asked

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {"prediction_type": "VPrediction", "zero_terminal_snr": True}


def corrected(folder, config, **asked):
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", config["_class_name"]]}))
    process = process_as_asked(load_discrete_process(folder), Asked(**asked))
    _correct_scheduler(folder, SimpleNamespace(process=process))
    return process


@pytest.mark.parametrize(
    ("name", "becomes"), [("PNDMScheduler", "DDIMScheduler"), ("EulerDiscreteScheduler", "EulerDiscreteScheduler")]
)
def test_a_pipeline_draws_on_the_schedule_that_was_trained(tmp_path, name, becomes):
    import diffusers

    process = corrected(tmp_path, STABLE_DIFFUSION | {"_class_name": name, "steps_offset": 1}, **ZERO)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", becomes]
    config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert config["rescale_betas_zero_snr"]
    assert (config["timestep_spacing"], config["prediction_type"]) == ("trailing", "v_prediction")
    scheduler = getattr(diffusers, becomes).from_pretrained(tmp_path / "scheduler")
    assert not getattr(scheduler.config, "clip_sample", False)
    torch.testing.assert_close(scheduler.alphas_cumprod, process.alphas_cumprod, rtol=1e-3, atol=1e-6)
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[0] == 999


@pytest.mark.parametrize("own", [{}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}])
def test_nothing_changes_where_nothing_is_asked_for(tmp_path, own):
    config = STABLE_DIFFUSION | {"_class_name": "PNDMScheduler"} | own
    corrected(tmp_path, config)
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text()) == config
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "PNDMScheduler"]


@pytest.mark.parametrize(
    ("family", "asked", "names"),
    [
        ("SDXL", ZERO, ["v_pred", "ztsnr"]),
        ("SDXL", {"prediction_type": "VPrediction"}, ["v_pred"]),
        ("SDXL", {}, []),
        ("SD1", ZERO, ["v_pred", "ztsnr"]),
        ("SD2", ZERO, []),
        ("SDXL", {"prediction_type": "Sample"}, []),
    ],
)
def test_a_single_file_says_that_it_predicts_v(tmp_path, family, asked, names):
    """Or ComfyUI, and a job that starts from it, would take v for the noise."""
    process = corrected(tmp_path, STABLE_DIFFUSION | {"_class_name": "DDIMScheduler"}, **asked)
    made = _markers(SimpleNamespace(name=family, process=process))
    tensorfile.write(tmp_path / "model.safetensors", {"x": torch.zeros(1), **made}, {})
    read = load_file(tmp_path / "model.safetensors")
    assert sorted(read) == sorted([*names, "x"])
    config = _scheduler({name: tuple(tensor.shape) for name, tensor in read.items()}, family)
    if family != "SD2" and asked.get("prediction_type") != "Sample":
        assert config["prediction_type"] == ("v_prediction" if names else "epsilon")
        assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in names)


@pytest.mark.parametrize(
    ("name", "process", "gamma"),
    [
        ("SD1", DiscreteProcess(torch.linspace(0.999, 0.005, 10), "Epsilon", {}), "5.0"),
        ("SD3", FlowProcess(3, {}), "None"),
    ],
)
def test_a_kohya_file_of_a_flow_claims_no_min_snr_weights(name, process, gamma):
    sections = {"method": "LoRA", "model": {"source": "s3://m/x/"}, "dataset": {"source": "s3://d/x/"}}
    spec = TrainerSpec.model_validate(sections | {"output": {"destination": "s3://o/x/"}})
    hashes = {"unet/a": "1", "transformer/a": "1"}
    family = SimpleNamespace(name=name, process=process, file_hashes=lambda: hashes)
    assert _training_metadata(LoRA(), family, spec)["ss_min_snr_gamma"] == gamma
