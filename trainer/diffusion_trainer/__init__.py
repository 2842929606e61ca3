"""What runs in the pod of a training job: `python -m diffusion_trainer`."""

from diffusion_trainer.hiding import hide_bitsandbytes

hide_bitsandbytes()  # here, for whichever module of the trainer comes first, diffusers must come after
