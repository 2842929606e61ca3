"""The stores of a run: where its model, dataset and results are, and who opens them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusion_api import names
from diffusion_api.run import RunConfig
from diffusion_trainer.errors import BadConfig
from diffusion_trainer.objectstore import Credentials, ObjectStore, join_uri, open_store
from diffusion_trainer.objectstore.settings import TransferSettings


@dataclass(frozen=True)
class Stores:
    """`state` is the folder of the job's resumable state, `open_state` opens it in another process."""

    model: ObjectStore
    dataset: ObjectStore
    output: ObjectStore
    state: ObjectStore
    open_state: Callable[[], ObjectStore]


def open_stores(run: RunConfig, *, credentials: Path, settings: TransferSettings | None = None) -> Stores:
    """Return the stores; nothing is contacted yet. `credentials` is the folder of the Secret, where one is named.

    Raises `PermissionDenied` when the Secret lacks a key, `InvalidUri` when a location is none.
    """
    spec = run.spec
    if spec.dataset.source is None:
        raise BadConfig("dataset.source is missing: name the folder with the images")
    opened = partial(
        open_store,
        credentials=Credentials.from_folder(credentials) if spec.credentials.secret_ref else None,
        endpoint_url=spec.credentials.endpoint_url,
        settings=settings,
    )
    open_state = partial(opened, join_uri(spec.output.destination, names.checkpoint_prefix(run.job.uid)))
    return Stores(
        model=opened(spec.model.source),
        dataset=opened(spec.dataset.source),
        output=opened(spec.output.destination),
        state=open_state(),
        open_state=open_state,
    )
