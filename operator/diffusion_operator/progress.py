"""What running trainers say of their progress: asked for at intervals, kept until somebody wants to know."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

import aiohttp
from pydantic import ValidationError

from diffusion_api import names
from diffusion_api.run import ProgressReport
from diffusion_operator.state import Heard

MAX_BYTES = 64 * 1024
JITTER = 0.2
TIMEOUT = aiohttp.ClientTimeout(total=5, connect=2)


class ProgressSource(Protocol):
    """Where reconciles hear of progress."""

    def __len__(self) -> int:
        """Return how many trainers are asked."""

    def follow(self, uid: str, *, address: str, attempt: int) -> None:
        """Ask that trainer from now on, instead of another one of the same job."""

    def forget(self, uid: str) -> None:
        """Ask nobody for this job any more."""

    def heard(self, uid: str, *, attempt: int) -> Heard:
        """Return what that attempt last said."""


@dataclass
class _Followed:
    address: str
    attempt: int
    task: asyncio.Task[None]
    heard: Heard


class ProgressPoller:
    """Asks each running job's trainer over HTTP. Lost answers cost nothing but news."""

    def __init__(
        self,
        *,
        seconds: float,
        clock: Callable[[], datetime],
        news: Callable[[str], None],
        port: int = names.METRICS_PORT,
    ) -> None:
        """`news` is called with the job's uid after each answer, and while there is none."""
        self._seconds = seconds
        self._clock = clock
        self._news = news
        self._port = port
        self._followed: dict[str, _Followed] = {}
        self._session: aiohttp.ClientSession | None = None

    def __len__(self) -> int:
        """Return how many trainers are asked."""
        return len(self._followed)

    def follow(self, uid: str, *, address: str, attempt: int) -> None:
        """Start to ask; harmless where it is asked already."""
        known = self._followed.get(uid)
        if known is not None and (known.address, known.attempt) == (address, attempt):
            return
        self.forget(uid)
        task = asyncio.get_running_loop().create_task(self._ask_for_ever(uid), name=f"progress of {uid}")
        self._followed[uid] = _Followed(address, attempt, task, Heard())

    def forget(self, uid: str) -> None:
        """Stop to ask."""
        known = self._followed.pop(uid, None)
        if known is not None:
            known.task.cancel()

    def heard(self, uid: str, *, attempt: int) -> Heard:
        """Return the last answer of that attempt."""
        known = self._followed.get(uid)
        if known is None or known.attempt != attempt:
            return Heard()
        cut_off = known.heard.silent_since is not None and self._few_answer()
        return replace(known.heard, others_silent=True) if cut_off else known.heard

    def _few_answer(self) -> bool:
        silent = sum(followed.heard.silent_since is not None for followed in self._followed.values())
        return silent > 1 and 2 * silent > len(self._followed)

    async def close(self) -> None:
        """End all questions."""
        tasks = [followed.task for followed in self._followed.values()]
        for uid in list(self._followed):
            self.forget(uid)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _ask_for_ever(self, uid: str) -> None:
        # The first question comes soon, so that a short job is heard of at all.
        pause = min(1.0, self._seconds)
        while True:
            await asyncio.sleep(pause * (1 + JITTER * (2 * random.random() - 1)))  # noqa: S311 - spreads load only
            pause = self._seconds
            followed = self._followed.get(uid)
            if followed is None:
                return
            followed.heard = await self._ask(followed)
            self._news(uid)

    async def _ask(self, followed: _Followed) -> Heard:
        old = followed.heard
        try:
            report = await self._fetch(followed)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            said = str(error) if not isinstance(error, ValidationError) else "the answer is no progress report"
            since = old.silent_since or self._clock()
            return Heard(report=old.report, silent_since=since, error=said or type(error).__name__)
        return Heard(report=report)

    async def _fetch(self, followed: _Followed) -> ProgressReport:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=TIMEOUT)
        host = f"[{followed.address}]" if ":" in followed.address else followed.address
        url = f"http://{host}:{self._port}{names.PROGRESS_PATH}"
        # A trainer is not trusted: it may not send the operator elsewhere, nor fill its memory.
        async with self._session.get(url, allow_redirects=False) as answer:
            if answer.status != 200:
                raise ValueError(f"{url} answered {answer.status}")
            content = await answer.content.read(MAX_BYTES + 1)
            with contextlib.suppress(asyncio.IncompleteReadError):
                while len(content) <= MAX_BYTES and (more := await answer.content.read(MAX_BYTES)):
                    content += more
        if len(content) > MAX_BYTES:
            raise ValueError(f"{url} answered with more than {MAX_BYTES} bytes")
        report = ProgressReport.model_validate_json(content, extra="ignore")
        if report.attempt != followed.attempt:
            raise ValueError(f"attempt {report.attempt} answered instead of {followed.attempt}")
        return report
