"""What the denoiser is asked for, and how far off it was. Pure functions in fp32; times are drawn from a given stream.

Belongs here: forward processes, targets, weights, how times are drawn. Does not belong here: networks (`models`), and
whose noise it is (`data`).

A time is what says how noisy an image is: a timestep (int64) of a discrete process, sigma (fp32) of a flow.
"""

from diffusion_trainer.objective.base import Objective, Process
from diffusion_trainer.objective.choosing import objective_of, process_as_asked, process_as_published
from diffusion_trainer.objective.discrete import DiscreteObjective, DiscreteProcess, Prediction
from diffusion_trainer.objective.flow import FlowObjective, FlowProcess

__all__ = [
    "DiscreteObjective",
    "DiscreteProcess",
    "FlowObjective",
    "FlowProcess",
    "Objective",
    "Prediction",
    "Process",
    "objective_of",
    "process_as_asked",
    "process_as_published",
]
