"""Why a job's pods do not run: raw objects of the cluster in, one cause with detail and hint out.

Belongs here: judging what others have said (scheduler, kubelet, autoscalers, Kueue, API server) against what the nodes
show. Must not be here: reading the cluster, clocks, and what is done about it. Nothing here raises on objects that lack
fields or hold nonsense: a diagnosis that fails would hide the very trouble it is for.

Start in `diagnosis.py`; its lists of rules are the order in docs/reference/waiting.md.
"""
