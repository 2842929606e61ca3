"""Objects behind one narrow protocol, whatever the store.

Belongs here: the protocol, its backends, URIs, credentials, and everything that imports a storage SDK.
Does not belong here: what the objects mean (checkpoints, datasets and exports live in their own rooms), caches, and
policies such as what to keep.
"""

from diffusion_trainer.objectstore.base import Capabilities, ObjectInfo, ObjectStore
from diffusion_trainer.objectstore.credentials import Credentials
from diffusion_trainer.objectstore.uri import join_uri, open_store, split_uri

__all__ = ["Capabilities", "Credentials", "ObjectInfo", "ObjectStore", "join_uri", "open_store", "split_uri"]
