"""Ways to interfere with a trainer from within its process. Each takes one argument from JSON."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from diffusion_trainer import rng, train


def seed_like_a_new_interpreter() -> None:
    """Seed what an interpreter seeds from the system when it starts, and the rest as well."""
    random.seed(os.urandom(16))
    np.random.seed(int.from_bytes(os.urandom(4)))  # noqa: NPY002 - the global one is the point
    torch.manual_seed(int.from_bytes(os.urandom(7)))


def poison_global_generators(_: object) -> None:
    """Throw every global generator off before each optimizer step, and between its gradients and its update."""
    _before("gradients", lambda _: seed_like_a_new_interpreter())
    _before("timed", lambda _: seed_like_a_new_interpreter())


def change_noise_of_step(step: int) -> None:
    """Give the noise of one optimizer step (from 0) another key: the error that comparisons of results must find."""
    original = hashlib.blake2b
    marks = (f"\x1fnoise\x1fint:{step}\x1f".encode(),)

    def blake2b(name: bytes, **options: Any) -> Any:
        return original(name + b"!" if any(mark in name for mark in marks) else name, **options)

    rng.blake2b = blake2b  # type: ignore[assignment, attr-defined]


def terminate_before_step(step: int) -> None:
    """Send SIGTERM to the trainer, as the kubelet would, while it works on optimizer step `step` (from 1)."""
    _before("gradients", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == step else None)


def terminate_twice_before_step(step: int) -> None:
    """Like `terminate_before_step`, from somebody who has no patience."""
    terminate_before_step(step)
    _before("timed", lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == step else None)


def _before(name: str, action: Callable[[int], None]) -> None:
    """Call `action` with the number of the call, from 1, before each call of a function of train.py."""
    original = getattr(train, name)
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        action(calls)
        return original(*args, **options)

    setattr(train, name, wrapped)
