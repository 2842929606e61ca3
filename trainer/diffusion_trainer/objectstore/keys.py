"""What may be a key, the same for every backend: what one of them could not hold, none takes."""

from __future__ import annotations

from diffusion_trainer.errors import InvalidKey, StorageError

RESERVED = ".objectstore-"  # the file backend's own files
_KEY_BYTES, _SEGMENT_BYTES = 1024, 255  # S3's limit; the limit of file names on Linux


def check_key(key: str, *, error: type[StorageError] = InvalidKey, where: str = "the store") -> None:
    """Raise `error` unless `key` can name an object in every backend."""
    reason = _fault(key)
    if reason is not None:
        raise error(f"key {key!r} in {where}: {reason}; use segments of printable characters joined by single '/'")


def check_prefix(prefix: str, *, where: str) -> None:
    """Raise `InvalidKey` unless some key can start with `prefix`; the last segment may be cut anywhere, or empty."""
    folder, slash, rest = prefix.rpartition("/")
    if slash:
        check_key(folder, where=where)
    if rest and rest not in {".", ".."} and not RESERVED.startswith(rest):
        check_key(rest, where=where)


def _fault(key: str) -> str | None:
    if not key:
        return "it is empty"
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in key):
        return "it has control characters"
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if length > _KEY_BYTES:
        return f"it is {length} bytes long, over {_KEY_BYTES}"
    return next(filter(None, map(_fault_of_segment, key.split("/"))), None)


def _fault_of_segment(segment: str) -> str | None:
    if segment in {"", ".", ".."}:
        return "it is absolute, ends in '/', or has an empty, '.' or '..' segment"
    if segment.startswith(RESERVED):
        return f"names starting with {RESERVED} are reserved"
    if len(segment.encode()) > _SEGMENT_BYTES:
        return f"a segment is longer than {_SEGMENT_BYTES} bytes"
    return None
