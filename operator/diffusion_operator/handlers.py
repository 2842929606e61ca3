"""The watches, and nothing else: kopf tells what changed, the controller's queue decides when it is looked at.

kopf's own machinery for handlers (progress in annotations, finalizers, a diff base, events) stays unused: every look at
a job starts from the cluster's state and not from what happened.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import kopf

from diffusion_api import names
from diffusion_operator.controller import Controller
from diffusion_operator.errors import OperatorError, SettingsError
from diffusion_operator.settings import Settings
from diffusion_operator.state import Object

JOB = (names.GROUP, names.VERSION, names.JOB_PLURAL)
PROFILE = (names.GROUP, names.VERSION, names.PROFILE_PLURAL)
RETRY_SECONDS = 5.0


class EndlessBackoffs:
    """Pauses between kopf's attempts to reach the API server: short, jittered, and without end.

    After a finite list kopf gives up a watch for good, and the operator would be deaf.
    """

    def __iter__(self) -> Iterator[float]:
        while True:
            yield RETRY_SECONDS * (0.2 + 0.8 * random.random())  # noqa: S311 - spreads load only


class NoDiffBase(kopf.DiffBaseStorage):
    """Keep no copy of objects: only events are handled, never differences."""

    def fetch(self, *, body: kopf.Body) -> None:
        """Return that nothing is known."""

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Keep nothing."""


_logins = itertools.count()


@kopf.on.login()
async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """Log in without the synchronous client library, which kopf would otherwise import.

    kopf ends the operator when credentials that were refused once are all that there is. But an API server refuses good
    tokens too, while it cannot check them, and a token that is being rotated is refused for a moment. So what was
    refused is offered again after a pause, with another priority, by which kopf takes it for something new.
    """
    number = next(_logins)
    if number:
        await asyncio.sleep(next(iter(EndlessBackoffs())))
    found = kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
    return None if found is None else dataclasses.replace(found, priority=number)


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    """Configure kopf as a mere watcher and start the controller."""
    # A watcher that waits for credentials when the end is asked for waits for ever; the kubelet would kill after 30 s.
    settings.process.ultimate_exiting_timeout = 25
    settings.posting.enabled = False
    settings.peering.standalone = True
    # Watching kinds and namespaces come and go would need rights on the whole cluster.
    settings.scanning.disabled = True
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.networking.error_backoffs = EndlessBackoffs()
    settings.networking.connect_timeout = 5
    settings.watching.connect_timeout = 5
    settings.watching.server_timeout = 300
    settings.queueing.idle_timeout = 1
    settings.watching.label_selectors["pods"] = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    try:
        ours = Settings.from_environment(os.environ)
    except SettingsError as error:
        raise kopf.PermanentError(str(error)) from error
    settings.networking.request_timeout = ours.request_seconds
    controller = Controller(ours)
    try:
        await controller.start()
    except asyncio.CancelledError:
        # Told to stop while it stood by: kopf cleans up only after a start.
        await controller.stop()
        raise
    except OperatorError as error:
        # Any other error kopf would try again, and say nothing to whoever reads only the pod's state.
        await controller.stop()
        raise kopf.PermanentError(str(error)) from error
    memo.controller = controller
    if controller.watches_nodes:
        # Registered only now: without the right to, kopf would ask again and again.
        kopf.on.event("nodes")(node_changed)


@kopf.on.cleanup()
async def stop(memo: kopf.Memo, **_: Any) -> None:
    """Stop the controller."""
    if "controller" in memo:
        await memo.controller.stop()


@kopf.on.event(*JOB)
async def job_changed(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Pass on news of a job."""
    memo.controller.job_seen(_object(event), gone=_gone(event))


@kopf.on.event("pods", labels={names.LABEL_MANAGED_BY: names.MANAGED_BY})
async def pod_changed(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Pass on news of a pod."""
    memo.controller.pod_seen(_object(event), gone=_gone(event))


@kopf.on.event(*PROFILE)
async def profile_changed(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Pass on news of a profile."""
    memo.controller.profile_seen(_object(event), gone=_gone(event))


async def node_changed(event: kopf.RawEvent, memo: kopf.Memo, **_: Any) -> None:
    """Pass on news of a node."""
    memo.controller.node_seen(_object(event), gone=_gone(event))


def _object(event: kopf.RawEvent) -> Object:
    return dict(event["object"])


def _gone(event: kopf.RawEvent) -> bool:
    return event["type"] == "DELETED"
