"""Asking trainers: a real HTTP server on this machine plays them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from diffusion_api.names import PROGRESS_PATH
from diffusion_operator.progress import MAX_BYTES, ProgressPoller
from diffusion_operator.state import Heard
from testkit.builders import NOW, make_report

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def asked(answer: Answer | None) -> AsyncIterator[Callable[[], Awaitable[Heard]]]:
    """Yield a function that returns what is heard next of a trainer that answers so; None: nobody listens."""
    app = web.Application()
    if answer is not None:
        app.router.add_get(PROGRESS_PATH, answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port: int = runner.addresses[0][1]
    if answer is None:
        await runner.cleanup()
    news: asyncio.Queue[str] = asyncio.Queue()
    poller = ProgressPoller(seconds=0.01, clock=lambda: NOW, news=news.put_nowait, port=port)
    poller.follow("job", address="127.0.0.1", attempt=2)

    async def heard() -> Heard:
        await asyncio.wait_for(news.get(), 10)
        return poller.heard("job", attempt=2)

    try:
        yield heard
    finally:
        await poller.close()
        await runner.cleanup()


def says(text: str, status: int = 200) -> Answer:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, status=status)

    return answer


async def test_a_report_is_heard() -> None:
    async with asked(says(make_report(900, attempt=2).model_dump_json(by_alias=True))) as heard:
        found = await heard()
    assert found.report is not None
    assert found.report.progress is not None
    assert (found.report.progress.step, found.silent_since) == (900, None)


async def test_a_newer_trainers_unknown_fields_are_ignored() -> None:
    text = make_report(900, attempt=2).model_dump_json(by_alias=True).replace("{", '{"newer":1,', 1)
    async with asked(says(text)) as heard:
        assert (await heard()).report is not None


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, "Cannot connect"),
        (says("no", 500), "answered 500"),
        (says("{}"), "no progress report"),
        (says("x" * (MAX_BYTES + 1)), "more than"),
        (says(make_report(900, attempt=1).model_dump_json(by_alias=True)), "attempt 1 answered instead of 2"),
    ],
)
async def test_what_cannot_be_used_is_silence_with_a_reason(answer: Answer | None, error: str) -> None:
    async with asked(answer) as heard:
        found = await heard()
        again = await heard()
    assert (found.report, found.silent_since, again.silent_since) == (None, NOW, NOW)
    assert error in found.error


async def test_a_trainer_cannot_send_the_operator_elsewhere() -> None:
    async def elsewhere(_request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("http://127.0.0.1:1/secret")

    async with asked(elsewhere) as heard:
        assert "answered 302" in (await heard()).error


async def test_the_last_report_outlives_silence() -> None:
    answers = iter([make_report(900, attempt=2).model_dump_json(by_alias=True)])

    async def once(_request: web.Request) -> web.StreamResponse:
        text = next(answers, None)
        return web.Response(text=text) if text else web.Response(status=503)

    async with asked(once) as heard:
        await heard()
        found = await heard()
    assert found.report is not None
    assert found.silent_since == NOW


async def test_it_is_known_when_most_are_silent() -> None:
    poller = ProgressPoller(seconds=60, clock=lambda: NOW, news=lambda _uid: None)
    silent, speaks = Heard(silent_since=NOW, error="refused"), Heard(report=make_report(900))
    for uid, heard in {"a": silent, "b": silent, "c": speaks, "d": speaks}.items():
        poller.follow(uid, address="127.0.0.1", attempt=1)
        poller._followed[uid].heard = heard
    assert poller.heard("a", attempt=1) == silent, "half of them are heard"
    poller.forget("d")
    assert poller.heard("a", attempt=1).others_silent
    assert poller.heard("c", attempt=1) == speaks
    poller.forget("b")
    poller.forget("c")
    assert poller.heard("a", attempt=1) == silent, "one alone may hang"
    await poller.close()


async def test_another_attempt_is_not_heard() -> None:
    poller = ProgressPoller(seconds=60, clock=lambda: NOW, news=lambda _uid: None)
    poller.follow("job", address="127.0.0.1", attempt=2)
    assert poller.heard("job", attempt=3) == Heard()
    await poller.close()
