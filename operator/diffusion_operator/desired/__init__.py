"""How the objects that the operator creates look: one pure builder per Kubernetes kind.

Belongs here: plain values in, a manifest out. Must not be here: deciding whether it is wanted (`policies`), creating it
(`apply`), anything that reads a clock or the cluster.
"""
