"""Publication of checkpoints on an object store: nothing acknowledged is lost, no zombie publishes unseen.

Belongs here: HEAD.json and its fence, manifests, the files of a snapshot, staging, the process that uploads, reading
back with verification, garbage collection.
Does not belong here: what a snapshot contains and when one is due (train), access to a store (objectstore), exports
for users (export).

The protocol, in the order of its steps:

1. `Ledger.acquire` takes the fence by compare-and-swap on HEAD.json; the HEAD it returns is the point to resume from.
2. `Publisher` copies the tensors to host memory (the only stall) and hands them to another process.
3. Files go to keys that no other start of the job uses, then MANIFEST.json, last.
4. Compare-and-swap of HEAD.json appends the entry: only now is the checkpoint acknowledged.
5. Only then are dropped checkpoints and orphans of older attempts deleted.
6. `Ledger.load` takes the newest entry that verifies, marks damaged ones, and never answers "none" when there was one.
"""

from diffusion_trainer.checkpoint.head import Best, Entry, Head, Lease
from diffusion_trainer.checkpoint.ledger import Ledger, Retention
from diffusion_trainer.checkpoint.messages import Target
from diffusion_trainer.checkpoint.publisher import Publisher, Saved
from diffusion_trainer.checkpoint.snapshot import Snapshot

__all__ = ["Best", "Entry", "Head", "Lease", "Ledger", "Publisher", "Retention", "Saved", "Snapshot", "Target"]
