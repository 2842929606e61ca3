"""Static credentials from a folder of files, as a projected Secret lays them.

Only the path is held: the secrets are read when a request is signed, and again when the files change, so that keys can
be rotated under a running upload. No representation of these objects shows a secret.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffusion_trainer.errors import PermissionDenied

_KEY_ID, _SECRET, _TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
_READS = 3  # kubelet swaps the folder while it is read at most once a minute


@dataclass(frozen=True, slots=True)
class Keys:
    """One consistent set of keys."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A folder of files. Picklable, and the pickle holds no secret.

    One file for each of AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where wanted, AWS_SESSION_TOKEN, AWS_REGION and
    AWS_ENDPOINT_URL.
    """

    folder: Path

    @classmethod
    def from_folder(cls, folder: Path | str) -> Credentials:
        """Return the credentials in `folder`. Raises `PermissionDenied` when the mandatory files are not there."""
        made = cls(Path(folder))
        made.read()
        return made

    @property
    def region(self) -> str | None:
        """Return what AWS_REGION holds."""
        return self._value(self.folder, "AWS_REGION")

    @property
    def endpoint_url(self) -> str | None:
        """Return what AWS_ENDPOINT_URL holds."""
        return self._value(self.folder, "AWS_ENDPOINT_URL")

    def version(self) -> tuple[object, ...]:
        """Return something that differs when any of the files was written or swapped since."""
        marks: list[object] = []
        for name in (_KEY_ID, _SECRET, _TOKEN):
            try:
                stat = (self.folder / name).stat()
            except FileNotFoundError:
                marks.append(None)
            else:
                marks.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return tuple(marks)

    def read(self) -> Keys:
        """Return the keys as they are now, all from one version of the folder."""
        for _ in range(_READS):
            before = self.version()
            key_id, secret, token = (self._value(self.folder, name) for name in (_KEY_ID, _SECRET, _TOKEN))
            if before == self.version():
                break
        missing = [name for name, value in ((_KEY_ID, key_id), (_SECRET, secret)) if not value]
        if not key_id or not secret:
            raise PermissionDenied(
                f"read credentials: {self.folder} has no {' and no '.join(missing)}; "
                "name a Secret with these keys in credentials.secretRef"
            )
        return Keys(key_id, secret, token)

    @staticmethod
    def _value(folder: Path, name: str) -> str | None:
        try:
            return (folder / name).read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise PermissionDenied(
                f"read credentials: {folder / name} cannot be read ({type(error).__name__}); "
                "check the Secret and the mode of its projected files"
            ) from error
