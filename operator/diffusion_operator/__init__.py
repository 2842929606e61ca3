"""The operator: turns DiffusionTrainingJobs into trainer pods, and what becomes of those into the jobs' status.

Belongs here: watching, deciding, and writing Kubernetes objects. Must not be here: training, reading datasets or
buckets, the contents of Secrets, and the contract (`diffusion_api`).

Read `decide.py` first: its list of policies is the specification. One look at a job goes
`handlers` (kopf's watches) -> `controller` (queue, workers) -> `reconcile` -> `observe` -> `decide` -> `apply`.
"""

from diffusion_operator import handlers

__all__ = ["handlers"]
