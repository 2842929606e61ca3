"""A few requests at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(function: Callable[[T], R], items: Iterable[T], *, parallel: int) -> list[R]:
    """Return the results in the order of the items. The first failure is raised; what has not begun then never does."""
    with ThreadPoolExecutor(parallel, thread_name_prefix="objectstore") as pool:
        running = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in running]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
