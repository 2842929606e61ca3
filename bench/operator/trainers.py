"""Trainers of pods that nothing runs in: one process that answers on the address of each, with progress that moves.

python -m bench.operator.trainers <first> <count>
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import sys
import time
from datetime import UTC, datetime

from aiohttp import web

from diffusion_api import names
from testkit.builders import make_progress, make_report

STEPS_PER_SECOND = 2
TOTAL = 100_000


async def answer(_request: web.Request) -> web.Response:
    """Answer as the trainer of a first attempt does."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    step = int(time.monotonic() * STEPS_PER_SECOND) % TOTAL
    progress = make_progress(step, total=TOTAL, time=now, loss=0.1, samples_per_second=8.0)
    return web.Response(
        text=make_report(step, progress=progress, time=now).model_dump_json(by_alias=True),
        content_type="application/json",
    )


async def serve(first: str, count: int) -> None:
    """Listen on `count` addresses from the first one."""
    app = web.Application()
    app.router.add_get(names.PROGRESS_PATH, answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    start = ipaddress.ip_address(first)
    for number in range(count):
        await web.TCPSite(runner, str(start + number), names.METRICS_PORT).start()
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
