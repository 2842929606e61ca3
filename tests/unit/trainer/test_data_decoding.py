"""Images from strangers: what is taken, what is turned into what, and what is quarantined with which reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusion_trainer.data.decoding import Rejected, decode


def saved(tmp_path, image, name="a.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixel(path):
    return decode(path).getpixel((0, 0))


def reason(path):
    with pytest.raises(Rejected) as caught:
        decode(path)
    return caught.value.reason


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_the_three_formats_are_read(tmp_path, name):
    image = decode(saved(tmp_path, Image.new("RGB", (40, 30), (250, 10, 20)), name, quality=100))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.array(image.getpixel((5, 5))) - (250, 10, 20)).max() <= 4


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tiff", "ppm"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path, suffix):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, suffix)
    path = tmp_path / "a.png"
    path.write_bytes(buffer.getvalue())
    assert reason(path) == "no JPEG, PNG or WebP image"


def test_an_empty_file_and_one_that_is_no_image(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"hello, this is no picture")
    assert reason(tmp_path / "empty.png") == "the file is empty"
    assert reason(tmp_path / "text.png") == "no JPEG, PNG or WebP image"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_truncated_file_is_never_filled_up_with_grey(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert reason(path) == "damaged or truncated image"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_more_transparency_than_colours_is_damage(tmp_path):
    """Pillow decodes such a file, and fails when it is asked what it looks like."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", bytes(768)), (b"tRNS", bytes(300)), (b"IDAT", zlib.compress(bytes(72)))]
    path = tmp_path / "palette.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks) + chunk(b"IEND", b""))
    assert reason(path) == "damaged or truncated image"


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(tmp_path, side):
    """81, 144 and 3600 million pixels promised in 60 bytes: below, between and above Pillow's own two limits."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert reason(path) == "more than 64 million pixels"


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_an_animation_is_refused(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), (i * 80, 0, 0)) for i in range(3)]
    assert reason(saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])) == "animated image"


def test_of_a_phones_mpo_the_first_picture_is_taken(tmp_path):
    second = Image.new("RGB", (16, 16), (0, 0, 255))
    path = saved(
        tmp_path, Image.new("RGB", (16, 16), (255, 0, 0)), "a.jpg", format="MPO", append_images=[second], save_all=True
    )
    assert pixel(path)[0] > 250


@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [(1, (40, 20), (0, 0)), (3, (40, 20), (39, 19)), (6, (20, 40), (19, 0)), (8, (20, 40), (0, 39))],
)
def test_exif_rotation_is_applied(tmp_path, orientation, size, corner):
    """EXIF 2.3, tag 0x0112: 3 is turned by 180 degrees, 6 must be turned clockwise, 8 counter-clockwise."""
    image = Image.new("RGB", (40, 20))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(saved(tmp_path, image, exif=exif))
    assert upright.size == size
    assert upright.getpixel(corner) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 255))
    image.putpixel((0, 0), (10, 10, 10, 0))
    upright = decode(saved(tmp_path, image.convert(mode) if mode != "P" else image.quantize(4)))
    assert upright.getpixel((0, 0)) == (255, 255, 255)
    assert upright.getpixel((3, 3)) == (10, 10, 10)


def test_half_transparent_is_mixed_with_white(tmp_path):
    assert pixel(saved(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 127)))) == (128, 128, 128)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    assert pixel(saved(tmp_path, grey)) == (128, 128, 128)


def test_grey_and_cmyk(tmp_path):
    assert pixel(saved(tmp_path, Image.new("L", (4, 4), 77))) == (77, 77, 77)
    red = decode(saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=100)).getpixel((0, 0))
    assert red[0] > 240
    assert max(red[1:]) < 15


def linear_profile():
    """Return an ICC profile (ICC.1:2001) with sRGB's colours and a gamma of 1."""

    def xyz(*values):
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256) + bytes(2)
    description = b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(12 + 67)
    tags = {
        b"desc": description + bytes(-len(description) % 4),
        b"cprt": b"text" + bytes(4) + b"none",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7139),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + len(table) + len(data))
    header[8:24] = b"\x02\x40\0\0mntrRGB XYZ "
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">iii", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    return bytes(header) + table + data


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_profile_is_converted(tmp_path, mode):
    """Half the light is 188 in sRGB (IEC 61966-2-1: 1.055 * 0.5 ** (1 / 2.4) - 0.055 = 0.735)."""
    colour = (128, 128, 128, 255)[: len(mode)]
    path = saved(tmp_path, Image.new(mode, (4, 4), colour), icc_profile=linear_profile())
    assert np.abs(np.array(pixel(path)) - 188).max() <= 1


def test_a_broken_colour_profile_is_ignored(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (4, 4), (200, 100, 50)), icc_profile=b"this is no profile")
    assert pixel(path) == (200, 100, 50)
