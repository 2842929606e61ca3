"""The stores of a run: where its model, dataset and results are, and who opens them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusion_api import names
from diffusion_api.model import Model
from diffusion_api.run import RunConfig
from diffusion_trainer.models.single_file import SingleFile
from diffusion_trainer.models.sources import Source, TextFolders, Unfolded, WithOtherText, WithOtherVae
from diffusion_trainer.objectstore import Credentials, ObjectStore, join_uri, open_store, split_uri
from diffusion_trainer.objectstore.settings import TransferSettings


@dataclass(frozen=True)
class Stores:
    """`datasets` are the folders of images, one for each concept; `scores` is a CLIP model's, where one is named.

    `state` is the folder of the job's resumable state, and `open_state` opens that in another process.
    """

    model: Source
    datasets: tuple[ObjectStore, ...]
    output: ObjectStore
    state: ObjectStore
    open_state: Callable[[], ObjectStore]
    scores: ObjectStore | None = None


def open_stores(run: RunConfig, *, credentials: Path, settings: TransferSettings | None = None) -> Stores:
    """Return the stores; nothing is contacted yet. `credentials` is the folder of the Secret, where one is named.

    Another process, which `open_state` is for, has settings of its own.

    Raises `PermissionDenied` when the Secret lacks a key, `InvalidUri` when a location is none.
    """
    spec = run.spec
    anywhere = partial(
        open_store,
        credentials=Credentials.from_folder(credentials) if spec.credentials.secret_ref else None,
        endpoint_url=spec.credentials.endpoint_url,
    )
    opened = partial(anywhere, settings=settings)
    state = join_uri(spec.output.destination, names.checkpoint_prefix(run.job.uid))
    return Stores(
        model=_model(spec.model, opened),
        datasets=tuple(opened(source) for source in spec.dataset.sources),
        output=opened(spec.output.destination),
        state=opened(state),
        open_state=partial(anywhere, state),
        scores=opened(spec.validation.scores.model) if spec.validation.scores else None,
    )


def _model(model: Model, opened: Callable[[str], ObjectStore]) -> Source:
    text = TextFolders(opened(model.text_encoder.source)) if model.text_encoder.source else None

    def elsewhere() -> frozenset[str]:
        return (text.components if text else frozenset()) | ({"vae"} if model.vae else set())

    found: Source
    if model.source.endswith(".safetensors"):
        root, key = split_uri(model.source)
        found = SingleFile(opened(root), key, elsewhere=elsewhere)
    else:
        found = Unfolded(opened(model.source))
    if text:
        found = WithOtherText(found, text)
    return WithOtherVae(found, opened(model.vae)) if model.vae else found
