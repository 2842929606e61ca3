"""Decoding of images that strangers made: nothing is believed before it was checked."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 200 * 1024 * 1024

# A header may promise more pixels than there is memory for. We check the size ourselves; Pillow's own warning comes
# first for very large ones and must be an error everywhere, not a line on stderr.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# What Pillow's parsers were seen to raise on damaged files. OSError includes UnidentifiedImageError and truncation.
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError, ZeroDivisionError,
    AttributeError, struct.error, zlib.error,
)  # fmt: skip
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class Rejected(Exception):  # noqa: N818 - it is no error of the run
    """An image cannot be used. The message is the reason under which it is counted; `detail` is for the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def decode(path: Path) -> Image.Image:
    """Return an image as upright sRGB without transparency (mode RGB), fully decoded.

    EXIF rotation is applied, colour profiles are converted, transparency becomes white, 16 bits become 8. Of a JPEG
    with several pictures (a phone's MPO) the first is taken.

    Raises:
        Rejected: it is empty, too large, animated, truncated, or no JPEG, PNG or WebP.

    """
    size = path.stat().st_size
    if size == 0:
        raise Rejected("the file is empty")
    if size > MAX_FILE_BYTES:
        raise Rejected(f"the file is larger than {MAX_FILE_BYTES // 1024**2} MiB")
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(image)
            image.load()
            return _in_srgb(ImageOps.exif_transpose(image))
    except _BOMB as error:
        raise Rejected(_too_many_pixels(), str(error)) from error
    except UnidentifiedImageError as error:
        raise Rejected("no JPEG, PNG or WebP image", str(error)) from error
    except _DAMAGE as error:
        raise Rejected("damaged or truncated image", str(error)) from error


def _check(image: Image.Image) -> None:
    """Look at the header only."""
    if image.width * image.height > MAX_PIXELS:
        raise Rejected(_too_many_pixels(), f"{image.width} x {image.height}")
    if image.format in {"PNG", "WEBP"} and getattr(image, "is_animated", False):
        raise Rejected("animated image")


def _too_many_pixels() -> str:
    return f"more than {MAX_PIXELS // 10**6} million pixels"


def _in_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
        profile = None
    opaque, alpha = _without_alpha(image)
    converted = _converted(opaque, profile)
    if alpha is None:
        return converted
    white = Image.new("RGB", converted.size, (255, 255, 255))
    white.paste(converted, mask=alpha)
    return white


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if "transparency" in image.info or image.mode in {"P", "PA", "La", "RGBa"}:
        image = image.convert("RGBA")
    if image.mode in {"RGBA", "LA"}:
        return image.convert("RGB" if image.mode == "RGBA" else "L"), image.getchannel("A")
    return image, None


def _converted(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and image.mode in {"RGB", "L", "CMYK"}:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one for other channels: viewers ignore it too
        else:
            if converted is not None:
                return converted
    return image.convert("RGB")
