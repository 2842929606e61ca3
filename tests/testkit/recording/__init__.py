"""Situations in which a job waits, made on a real control plane and written down as the corpus of the diagnosis.

Real are API server with admission, scheduler, the controllers named in `plant`, Kueue with its webhooks, and the pods,
which are those that the operator builds; nodes and kubelets are kwok's or nobody's. Belongs here: making situations,
and what their maker knows of them. Must not be here: anything of the diagnosis, which would label its own work.

`python -m testkit.recording [SITUATION ...]` records anew; docs/reliability/waiting-corpus.md says what comes of it.
"""
