"""Dataset layouts: from the objects of a folder to candidates, images with their captions."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from diffusion_trainer.errors import BadData, InputMissing
from diffusion_trainer.objectstore import ObjectInfo, ObjectStore
from diffusion_trainer.objectstore.parallel import in_parallel

METADATA = "metadata.jsonl"
CAPTION_SUFFIXES = (".txt", ".caption")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff")
MAX_CAPTION_CHARACTERS = 4096
MAX_METADATA_BYTES = 256 * 1024 * 1024
_MAX_CAPTION_BYTES = 4 * MAX_CAPTION_CHARACTERS
_PARALLEL = 16
_SHOWN = 5

Layout = Literal["ImageFolder", "Sidecar"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may be used. `caption` None: it has none. `fault`: why it cannot be used, "" if it may be."""

    key: str
    size_bytes: int
    caption: str | None = None
    fault: str = ""


def read_layout(source: ObjectStore, layout: str, *, field: str = "dataset.source") -> tuple[Candidate, ...]:
    """Return the images of a folder and their captions, in the byte order of their keys.

    `layout` is `dataset.format`: Auto takes ImageFolder where there is a metadata.jsonl, else Sidecar. `field` names
    the folder in messages.

    Raises:
        InputMissing: there is no image, or no metadata.jsonl for ImageFolder.
        BadData: metadata.jsonl cannot be parsed, or names images that are not there.

    """
    return candidates({info.key: info for info in source.list() if not hidden(info.key)}, source, layout, field=field)


def candidates(
    objects: Mapping[str, ObjectInfo], source: ObjectStore, layout: str, *, field: str = "dataset.source"
) -> tuple[Candidate, ...]:
    """Return what `read_layout` does, of a folder that consists of these objects."""
    images = [info for key, info in objects.items() if key.lower().endswith(IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES)]
    if not images:
        raise InputMissing(
            f"{field} {source.uri} has no images ({', '.join(IMAGE_SUFFIXES)}) among its {len(objects)} objects;"
            " check the URI, and that the upload is complete"
        )
    tables = [info for key, info in objects.items() if posixpath.basename(key) == METADATA]
    if layout == "ImageFolder" and not tables:
        raise InputMissing(f"dataset.format is ImageFolder, but {source.uri} has no {METADATA}; add it, or use Sidecar")
    if tables and layout != "Sidecar":
        captions: Mapping[str, str | _Fault] = _from_tables(source, tables, objects)
    else:
        captions = _from_sidecars(source, images, objects)
    return tuple(_candidate(info, captions.get(info.key)) for info in images)


class _Fault(str):
    """Why a caption cannot be used; not to be taken for one."""

    __slots__ = ()


def _candidate(info: ObjectInfo, caption: str | None) -> Candidate:
    if isinstance(caption, _Fault):
        return Candidate(info.key, info.size, fault=str(caption))
    if info.key.lower().endswith(OTHER_IMAGE_SUFFIXES):
        return Candidate(info.key, info.size, caption, fault="no JPEG, PNG or WebP image")
    if caption is not None and len(caption) > MAX_CAPTION_CHARACTERS:
        return Candidate(info.key, info.size, fault=_too_long())
    stripped = caption.strip() if caption is not None else ""
    return Candidate(info.key, info.size, stripped or None)


def _too_long() -> str:
    return f"caption longer than {MAX_CAPTION_CHARACTERS} characters"


def hidden(key: str) -> bool:
    """Return whether a program left it there (.DS_Store, ._image.jpg, .cache/), not the user."""
    return any(part.startswith((".", "__MACOSX")) for part in key.split("/"))


def sidecars(image: str) -> tuple[str, ...]:
    """Return the keys at which the caption of an image may lie, first choice first."""
    stem = posixpath.splitext(image)[0]
    return tuple(stem + suffix for suffix in CAPTION_SUFFIXES)


def _from_sidecars(
    source: ObjectStore, images: Iterable[ObjectInfo], objects: Mapping[str, ObjectInfo]
) -> dict[str, str | _Fault]:
    named: dict[str, str] = {}
    for info in images:
        found = next((key for key in sidecars(info.key) if key in objects), None)
        if found:
            named[info.key] = found

    def read(sidecar: str) -> str | _Fault:
        if objects[sidecar].size > _MAX_CAPTION_BYTES:
            return _Fault(_too_long())
        return _text(source.get(sidecar))

    return dict(zip(named, in_parallel(read, named.values(), parallel=_PARALLEL), strict=True))


def _text(data: bytes) -> str | _Fault:
    try:
        return data.decode("utf-8-sig")  # Windows editors write a byte order mark
    except UnicodeDecodeError:
        return _Fault("caption is not UTF-8")


def _from_tables(
    source: ObjectStore, tables: Iterable[ObjectInfo], objects: Mapping[str, ObjectInfo]
) -> dict[str, str | _Fault]:
    captions: dict[str, str | _Fault] = {}
    missing: list[str] = []
    for info in tables:
        folder = posixpath.dirname(info.key)
        for file_name, caption in _rows(source, info):
            key = posixpath.normpath(posixpath.join(folder, file_name))
            if key not in objects:
                missing.append(file_name)
            elif caption is not None:
                captions[key] = caption
    if missing:
        raise BadData(
            f"{source.uri}: {METADATA} names {len(missing)} images that are not there: "
            f"{', '.join(sorted(missing)[:_SHOWN])}; upload them, or remove their lines (file_name is relative to the "
            "folder of the file)"
        )
    return captions


def _rows(source: ObjectStore, info: ObjectInfo) -> Iterable[tuple[str, str | None]]:
    where = f"{source.uri}{info.key}"
    if info.size > MAX_METADATA_BYTES:
        raise BadData(f"{where} is larger than {MAX_METADATA_BYTES // 1024**2} MiB; split it by folder")
    text = _text(source.get(info.key))
    if isinstance(text, _Fault):
        raise BadData(f"{where} is not UTF-8; save it as UTF-8")
    # Only "\n" ends a line: str.splitlines would cut captions at U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _row(line, f"{where}, line {number}")


def _row(line: str, where: str) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{where}: no JSON object ({error}); write one object per line") from error
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise BadData(f'{where}: no "file_name"; write {{"file_name": "a.png", "text": "a caption"}}')
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise BadData(f'{where}: "text" is no string; write the caption as one string')
    if text is not None and any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise BadData(f'{where}: "text" has half a surrogate pair; write the caption in UTF-8')
    return row["file_name"], text
