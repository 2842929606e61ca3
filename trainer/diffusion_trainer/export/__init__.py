"""Results in the formats that other programs load.

Belongs here: key maps, metadata, file layouts. Does not belong here: uploading, and what is trained (`methods`).
Equal weights give equal bytes: no times, no names of jobs, no paths.
"""

from diffusion_trainer.export.diffusers_format import export_diffusers
from diffusion_trainer.export.kohya_format import export_kohya
from diffusion_trainer.export.single_file import export_single_file
from diffusion_trainer.export.writers import Writer, writer_of

__all__ = ["Writer", "export_diffusers", "export_kohya", "export_single_file", "writer_of"]
