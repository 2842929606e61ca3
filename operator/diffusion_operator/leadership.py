"""Which of several operators is the active one: the holder of a Lease. The others stand by.

The rules are those of client-go's leader election. No two clocks are ever compared: whoever waits counts from when it
saw the record change, and the holder counts from before it asked to renew and gives up a third earlier than anybody may
take over. Why a Lease and not kopf's peering: docs/decisions/0007-one-active-operator.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from diffusion_operator.errors import ClusterError, ConflictError, ExistsError, NotFoundError, RefusedError
from diffusion_operator.state import Object

logger = logging.getLogger(__name__)

TRUSTED_SHARE = 2 / 3
"""Share of the Lease's duration after which a holder that could not renew it does not trust it any more."""
RENEWALS = 5
"""Attempts to renew, or to take over, within the Lease's duration."""


class Leases(Protocol):
    """What is asked of Kubernetes."""

    async def get_lease(self, namespace: str, name: str) -> Object:
        """Return the Lease."""

    async def create_lease(self, lease: Object) -> Object:
        """Create the Lease; ExistsError where somebody was faster."""

    async def replace_lease(self, lease: Object) -> Object:
        """Replace the Lease; ConflictError where it is not as it was read."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who wants to hold which Lease."""

    namespace: str
    name: str
    identity: str
    """Different for each operator, the same for one that is started again in its place: the pod's name."""
    seconds: int
    """How long after its last renewal a Lease is still its holder's."""


class Leadership:
    """One operator's hold on the Lease."""

    def __init__(
        self,
        leases: Leases,
        claim: Claim,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._leases = leases
        self._claim = claim
        self._monotonic = monotonic
        self._sleep = sleep
        self._trusted_until = 0.0
        self._seen: tuple[Any, float] | None = None
        """What another holder's record said, and since when it says so."""
        self._holder = ""

    def held(self) -> bool:
        """Return whether nobody else can hold it at this moment."""
        return self._monotonic() < self._trusted_until

    async def acquire(self) -> None:
        """Wait until it is held."""
        while not await self._try():
            await self._sleep(self._claim.seconds / RENEWALS)
        logger.info("holds the lease %s/%s: active", self._claim.namespace, self._claim.name)

    async def hold(self) -> None:
        """Renew it until it is lost."""
        while True:
            await self._sleep(self._claim.seconds / RENEWALS)
            renewed = await self._try()
            if not renewed and (self._holder != self._claim.identity or not self.held()):
                self._trusted_until = 0.0
                return

    async def release(self) -> None:
        """Give it up, so that another one need not wait. Only for whoever does nothing more."""
        if not self.held():
            return
        self._trusted_until = 0.0
        try:
            lease = await self._leases.get_lease(self._claim.namespace, self._claim.name)
            if lease["spec"].get("holderIdentity") == self._claim.identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._leases.replace_lease(lease)
        except ClusterError as error:
            logger.warning("the lease could not be given up, and will be waited for: %s", error)

    async def _try(self) -> bool:
        """Take or renew the Lease if it may be had; return whether that was done."""
        began = self._monotonic()
        left = self._trusted_until - began
        try:
            # A request that outlives the trust in the Lease helps nobody.
            async with asyncio.timeout(left if left > 0 else self._claim.seconds):
                taken = await self._take()
        except (ConflictError, ExistsError):
            logger.debug("the lease was written by somebody else")
            return False
        except RefusedError as error:
            logger.error("the lease may not be used: %s", error)  # noqa: TRY400 - the message says it all
            return False
        except (ClusterError, TimeoutError) as error:
            logger.warning("the lease could not be read or written: %s", error or "no answer")
            return False
        if taken:
            self._trusted_until = began + self._claim.seconds * TRUSTED_SHARE
        return taken

    async def _take(self) -> bool:
        claim = self._claim
        try:
            lease = await self._leases.get_lease(claim.namespace, claim.name)
        except NotFoundError:
            await self._leases.create_lease(self._record({}, {"name": claim.name, "namespace": claim.namespace}))
            self._holder = claim.identity
            return True
        spec = lease.get("spec") or {}
        if not self._free(spec):
            return False
        await self._leases.replace_lease(self._record(spec, lease["metadata"]))
        self._holder = claim.identity
        return True

    def _free(self, spec: Object) -> bool:
        self._holder = spec.get("holderIdentity") or ""
        if self._holder in {"", self._claim.identity}:
            return True
        record = (self._holder, spec.get("renewTime"), spec.get("leaseTransitions"))
        if self._seen is None or self._seen[0] != record:
            self._seen = (record, self._monotonic())
            return False
        seconds = max(self._claim.seconds, spec.get("leaseDurationSeconds") or 0)
        return self._monotonic() - self._seen[1] >= seconds

    def _record(self, spec: Object, metadata: Object) -> Object:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        new = spec.get("holderIdentity") != self._claim.identity
        changes: Object = {
            "holderIdentity": self._claim.identity,
            "leaseDurationSeconds": self._claim.seconds,
            "renewTime": now,
        }
        if new:
            transitions = (spec.get("leaseTransitions") or 0) + (1 if spec else 0)
            changes |= {"acquireTime": now, "leaseTransitions": transitions}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {**spec, **changes},
        }
