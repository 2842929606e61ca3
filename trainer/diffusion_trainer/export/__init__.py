"""Results in the formats that other programs load.

Belongs here: key maps, metadata, file layouts. Does not belong here: uploading, and what is trained (`models`).
Equal weights give equal bytes: no times, no names of jobs, no paths.
"""

from diffusion_trainer.export.diffusers_format import export_diffusers
from diffusion_trainer.export.kohya_format import export_kohya

__all__ = ["export_diffusers", "export_kohya"]
