"""The contract: what a user may write, what the operator and the trainer say to each other, and every shared name.

Belongs here: the kinds (spec and status), the wire between operator and trainer, outcomes, names, validation, and the
generator of everything that is derived from them. Must not be here: torch, kopf, an API client, any I/O beyond the
generator's files. Both sides import this package; it imports pydantic only.
"""
