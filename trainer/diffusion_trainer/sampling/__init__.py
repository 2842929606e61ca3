"""Sample pictures while training: the same prompts from the same noise, with the weights as they are in memory.

Belongs here: samplers, grids, the text in their files. Does not belong here: where pictures go (`evaluation`).
"""

from diffusion_trainer.sampling.grid import SampleGrid, Wanted, draw, encoded, sample_grid, wanted

__all__ = ["SampleGrid", "Wanted", "draw", "encoded", "sample_grid", "wanted"]
