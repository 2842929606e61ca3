"""Uploads of what is nice to have on the way (curves, sample pictures), by a thread, so that training never waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from diffusion_trainer.errors import StorageError
from diffusion_trainer.objectstore import ObjectStore


class Courier:
    """Puts the newest content of each key; one that is overtaken before its turn is never sent.

    A failure is a warning, for these objects decide nothing; `close` sends what failed once more, and raises then.
    """

    def __init__(self, store: ObjectStore, *, on_warning: Callable[[str], None]) -> None:
        self._store = store
        self._on_warning = on_warning
        self._waiting: dict[str, bytes | Path] = {}
        self._failed: dict[str, bytes | Path] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="courier", daemon=True)
        self._thread.start()

    def send(self, key: str, content: bytes | Path) -> None:
        """Hand over an object; a file is read when its turn comes."""
        with self._changed:
            self._failed.pop(key, None)
            self._waiting[key] = content
            self._changed.notify_all()

    def close(self, *, deliver: bool = True) -> None:
        """End the thread, after everything was sent where `deliver`. Raises StorageError like a put."""
        with self._changed:
            if not deliver:
                self._waiting.clear()
            self._closing = True
            self._changed.notify_all()
        if deliver:
            self._thread.join()
            for key, content in self._failed.items():
                self._put(key, content)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(deliver=kind is None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                key = next(iter(self._waiting))
                content = self._waiting.pop(key)
            try:
                self._put(key, content)
            except StorageError as error:
                self._on_warning(f"upload {key}: {error}")
                with self._changed:
                    if key not in self._waiting:
                        self._failed[key] = content

    def _put(self, key: str, content: bytes | Path) -> None:
        if isinstance(content, Path):
            self._store.put_file(key, content)
        else:
            self._store.put(key, content)
