"""From gradients to new weights: learning rates, algorithms, precision of the gradients, and their state by name.

Belongs here: closed forms of the learning rate, the optimizers of the API (from libraries that are kept), clipping, the
loss scale of fp16, and what of all this a checkpoint has to hold.
Does not belong here: which parameters are trained (`methods`), averages of weights (`ema`), what to do about losses
that are no numbers (`guard`).
"""

from diffusion_trainer.optim.algorithms import Group, make_optimizer
from diffusion_trainer.optim.scaling import LossScale
from diffusion_trainer.optim.schedules import lr_at
from diffusion_trainer.optim.state import OptimizerState, load_optimizer, optimizer_state
from diffusion_trainer.optim.update import Update, apply_update

__all__ = [
    "Group",
    "LossScale",
    "OptimizerState",
    "Update",
    "apply_update",
    "load_optimizer",
    "lr_at",
    "make_optimizer",
    "optimizer_state",
]
