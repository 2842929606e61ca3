"""Ways to interfere with a trainer from within its process. Each takes one argument from JSON."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from diffusion_trainer import evaluation, fitting, launching, optim, progress, rng, stepping, supervisor, train


def seed_like_a_new_interpreter() -> None:
    """Seed what an interpreter seeds from the system when it starts, and the rest as well."""
    random.seed(os.urandom(16))
    np.random.seed(int.from_bytes(os.urandom(4)))  # noqa: NPY002 - the global one is the point
    torch.manual_seed(int.from_bytes(os.urandom(7)))


def poison_global_generators(_: object) -> None:
    """Throw every global generator off before each optimizer step, and between its gradients and its update."""
    _before("gradients", lambda _: seed_like_a_new_interpreter(), stepping)
    _before("timed", lambda _: seed_like_a_new_interpreter())


def change_noise_of_step(step: int) -> None:
    """Give the noise of one optimizer step (from 0) another key: the error that comparisons of results must find."""
    _change_keys(f"\x1fnoise\x1fint:{step}\x1f")


def change_purpose(purpose: str) -> None:
    """Give everything that is drawn for a purpose another key."""
    _change_keys(f"\x1f{purpose}\x1f")


def _change_keys(mark: str) -> None:
    original = hashlib.blake2b

    def blake2b(name: bytes, **options: Any) -> Any:
        return original(name + b"!" if mark.encode() in name else name, **options)

    rng.blake2b = blake2b  # type: ignore[assignment, attr-defined]


def terminate_before_step(step: int) -> None:
    """Send SIGTERM to the trainer, as the kubelet would, while it works on optimizer step `step` (from 1)."""
    _before("gradients", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == step else None, stepping)


def terminate_twice_before_step(step: int) -> None:
    """Like `terminate_before_step`, from somebody who has no patience."""
    terminate_before_step(step)
    _before("timed", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == step else None)


def terminate_during(function: str) -> None:
    """Send SIGTERM when train.py calls a function of its own for the first time."""
    _before(function, lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 1 else None)


def terminate_while_scoring(number: int) -> None:
    """Send SIGTERM before pictures for scores are drawn for the time `number` (from 1)."""
    _before("pictures_of", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == number else None, evaluation)


def terminate_during_evaluation(number: int) -> None:
    """Send SIGTERM when evaluation `number` (from 1) has begun."""
    _before("validate", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == number else None, evaluation)


def overshoot_from(step: int) -> None:
    """Plant an overfit: from optimizer step `step` (from 0) on, weights double before each step.

    It goes by the step and not by the number of calls, so a resumed run does the same.
    """
    original = stepping.gradients

    def gradients(batches: Any, ready: Any) -> Any:
        if batches[0].slots[0].step >= step:
            with torch.no_grad():
                for parameter in ready.trained.parameters.values():
                    parameter.mul_(2)
        return original(batches, ready)

    stepping.gradients = gradients


def lack_memory_in_update(step: int) -> None:
    """Find no memory when the optimizer's step `step` (from 1) is due: after the sum, where nobody votes any more."""

    def fail(count: int) -> None:
        if count == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    _before("apply_update", fail, optim)


def hang_before_step(step: int) -> None:
    """Never come back from optimizer step `step` (from 1)."""
    _before("gradients", lambda count: threading.Event().wait() if count == step else None, stepping)


def hang_during(function: str) -> None:
    """Never come back from a function of train.py."""
    _before(function, lambda _: threading.Event().wait())


def fail_before_step(case: tuple[int, str]) -> None:
    """Raise in optimizer step `step` what torch raises; memory is short for good then."""
    step, kind = case
    errors = {
        "out-of-memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "gpu": RuntimeError("CUDA error: unspecified launch failure"),
        "bug": ZeroDivisionError("a bug"),
    }

    def fail(count: int) -> None:
        if count == step or (count > step and kind == "out-of-memory"):
            raise errors[kind]

    _before("gradients", fail, stepping)


def fork_processes(_: object) -> None:
    """Fork the training processes of a pod instead of starting interpreters: fair for the reasons in `testkit.warm`.

    Nothing has used a device, and the threads there are by then wait for signals and for sockets.
    """
    launching.START_METHOD = "fork"
    # Its thread in C is not forked, and its lock would be held for ever.
    supervisor.faulthandler.dump_traceback_later = lambda *_args, **_options: None  # type: ignore[attr-defined]


def in_rank(case: tuple[int, str, Any]) -> None:
    """Apply another seam in one training process only: (rank, name, argument)."""
    rank, name, argument = case
    original = train.train

    def train_(*args: Any) -> None:
        if os.environ["RANK"] == str(rank):
            globals()[name](argument)
        original(*args)

    train.train = train_  # type: ignore[assignment]


def terminate_pod_before_step(step: int) -> None:
    """Send SIGTERM to the pod's first process while this one works on optimizer step `step` (from 1)."""
    _before("gradients", lambda count: os.kill(os.getppid(), signal.SIGTERM) if count == step else None, stepping)


def lose_loss_of_step(step: int) -> None:
    """Make the loss of optimizer step `step` (from 1) not a number."""
    original = stepping.gradients
    calls = 0

    def gradients(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*args)
        return loss * float("nan") if calls == step else loss

    stepping.gradients = gradients  # type: ignore[assignment]


def lose_losses_while_the_rate_is_high(case: tuple[int, float]) -> None:
    """Make losses not a number after `step` optimizer steps, until the learning rate was halved enough."""
    step, enough = case
    original = stepping.Stepper.take

    def take(self: stepping.Stepper, batches: Any, done: int) -> stepping.Taken:
        if done >= step and self._ready.trained.guard.factor > enough:
            batches = [replace(batch, weights=batch.weights * float("nan")) for batch in batches]
        return original(self, batches, done)

    stepping.Stepper.take = take  # type: ignore[method-assign, assignment]


def lose_every_loss_from_step(step: int) -> None:
    """Make losses not a number from optimizer step `step` (from 1) on, whatever is done about it."""
    original = stepping.gradients
    calls = 0

    def gradients(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*args) * (float("nan") if calls >= step else 1)

    stepping.gradients = gradients  # type: ignore[assignment]


def limit_memory(images: int) -> None:
    """Let micro-batches of more than so many images fail as CUDA does, on what counts as a GPU then.

    They fail in the middle: the gradients of the first micro-batch are there already.
    """
    fitting.is_limited = lambda device: True  # noqa: ARG005 - its name
    fitting.memory_of = lambda device: None  # noqa: ARG005
    fail_above(images)


def fail_above(images: int) -> None:
    """Like `limit_memory`, on what is no GPU: nothing is tried before the first step."""
    original = stepping.gradients

    def gradients(batches: Any, ready: Any) -> torch.Tensor:
        if any(len(batch.latents) > images for batch in batches):
            original(batches[:1], ready)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(batches, ready)

    stepping.gradients = gradients


def look_before_step(case: tuple[int, str]) -> None:
    """Leave in a file what /progress and /metrics answer while optimizer step `step` (from 1) is computed."""
    step, path = case
    servers: list[progress.ProgressServer] = []
    original = progress.ProgressServer.__init__

    def remember(self: progress.ProgressServer, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        servers.append(self)

    progress.ProgressServer.__init__ = remember  # type: ignore[method-assign]

    def look(count: int) -> None:
        if count == step:
            root = f"http://127.0.0.1:{servers[0].server_port}"
            answers = [
                urllib.request.urlopen(root + page, timeout=10) for page in ("/progress", "/metrics", "/healthz")
            ]
            Path(path).write_text(json.dumps([answer.read().decode() for answer in answers]))

    _before("gradients", look, stepping)


def _before(name: str, action: Callable[[int], object], module: ModuleType = train) -> None:
    """Call `action` with the number of the call, from 1, before each call that `module` makes of a function."""
    original = getattr(module, name)
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        action(calls)
        return original(*args, **options)

    setattr(module, name, wrapped)
