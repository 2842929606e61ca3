"""From what a job asks for, and what its model is, to an objective."""

from __future__ import annotations

from dataclasses import replace

from diffusion_api.training import SNR_GAMMA
from diffusion_api.training import Objective as Asked
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.objective.base import Objective, Process
from diffusion_trainer.objective.discrete import DiscreteObjective, DiscreteProcess, without_terminal_signal
from diffusion_trainer.objective.flow import FlowObjective, FlowProcess


def process_as_asked(process: Process, asked: Asked) -> Process:
    """Return the process that is trained, sampled and exported: the model's own, predicting what is asked for.

    Raises:
        BadConfig: the model's process cannot predict that, or has no shift or no such weights.

    """
    wanted = asked.prediction_type
    if isinstance(process, FlowProcess):
        if wanted not in {"Auto", "Flow"}:
            raise BadConfig(f"training.objective.predictionType is {wanted}, but the model is a flow; use Auto")
        if asked.snr_gamma not in (None, SNR_GAMMA):
            raise BadConfig(
                f"training.objective.snrGamma is {asked.snr_gamma:g}, but the model is a flow, for which min-SNR "
                "weights are not defined; leave it out"
            )
        if asked.zero_terminal_snr:
            raise BadConfig(
                "training.objective.zeroTerminalSNR is true, but the model is a flow, which ends in nothing but noise "
                "as it is; leave it out"
            )
        return process
    if wanted == "Flow":
        raise BadConfig("training.objective.predictionType is Flow, but the model is no flow; use Auto")
    if asked.shift is not None:
        raise BadConfig(
            f"training.objective.shift is {asked.shift:g}, but only flow models have one; leave it out, or use a "
            "model of family SD3"
        )
    process = process if wanted == "Auto" else replace(process, prediction_type=wanted)
    if asked.zero_terminal_snr:
        return _ending_in_noise(process)
    if _contradicts_itself(process):
        raise BadConfig(
            "training.objective.predictionType: the model's noise schedule ends without any signal "
            "(rescale_betas_zero_snr), where the noise says nothing of the image; use VPrediction"
        )
    return process


def process_as_published(process: Process, asked: Asked, *, silent: bool) -> Process:
    """Return the process that draws before any training: the model's own, whatever the job trains it to predict.

    Where the model does not say what it predicts (`silent`), or says what cannot be, the job's word is all there is.
    Raises `BadConfig` as `process_as_asked` does.
    """
    known = not silent and not (isinstance(process, DiscreteProcess) and _contradicts_itself(process))
    return process_as_asked(process, Asked() if known else Asked(prediction_type=asked.prediction_type))


def _contradicts_itself(process: DiscreteProcess) -> bool:
    """Return whether the noise is predicted where there is nothing but noise, which says nothing of the image."""
    return process.prediction_type == "Epsilon" and bool(process.alphas_cumprod[-1] == 0)


def _ending_in_noise(process: DiscreteProcess) -> DiscreteProcess:
    if process.prediction_type == "Epsilon":
        raise BadConfig(
            "training.objective.zeroTerminalSNR is true, but the denoiser predicts the noise, which says nothing of "
            "the image where all is noise; set predictionType: VPrediction as well"
        )
    return replace(
        process,
        alphas_cumprod=without_terminal_signal(process.alphas_cumprod),
        config={**process.config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    )


def objective_of(process: Process, asked: Asked) -> Objective:
    """Return the objective, its tables on the CPU. The default of `snrGamma` weighs nothing where it is a flow."""
    if isinstance(process, FlowProcess):
        sampling = "LogitNormal" if asked.timestep_sampling == "Auto" else asked.timestep_sampling
        return FlowObjective(process.shift if asked.shift is None else asked.shift, sampling)
    return DiscreteObjective.of(
        process.alphas_cumprod,
        prediction=process.prediction_type,
        gamma=asked.snr_gamma,
        sampling="Uniform" if asked.timestep_sampling == "Auto" else asked.timestep_sampling,
    )
