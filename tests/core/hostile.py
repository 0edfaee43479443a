"""Pictures that try a reader: odd ones that must be read, and bad ones that must be refused.

`write_hostile(folder)` writes them all and says of each what is expected of it. `odd_picture(seed)`
makes a picture of an odd size in one of Pillow's modes. Everything is drawn from seeds; nothing is
taken from elsewhere.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

HUGE = 60_000


@dataclass(frozen=True)
class Case:
    """A path, whether it is a picture, and if not, what the message has to contain."""

    path: Path
    good: bool
    message: str = ""


def smooth(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture (H, W, 3) uint8 without sharp edges: a few long waves in every channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.zeros((height, width, 3))
    for channel in range(3):
        for _ in range(3):
            fx, fy, phase = rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(0, 6.28)
            waves[..., channel] += np.sin(6.28 * (fx * x / max(width, 2) + fy * y / max(height, 2)) + phase)
    return np.uint8(np.clip(127.5 + 40 * waves, 0, 255))


ODD_MODES = ("RGB", "L", "P", "P+alpha", "RGBA", "LA", "CMYK", "1", "YCbCr", "RGB", "L", "RGBA")


def odd_picture(seed: int) -> Image.Image:
    """A picture of odd size, flat or noisy, in a mode that the seed picks."""
    rng = np.random.default_rng(seed)
    mode = ODD_MODES[seed % len(ODD_MODES)]
    width, height = (int(side) for side in rng.integers(1, 420, size=2))
    if seed % 7 == 3:  # extreme aspects
        width, height = (width, 1 + height % 9) if seed % 2 else (1 + width % 9, height)
    noise = rng.integers(0, 256, size=(height, width, 3))
    share = rng.uniform()
    # Triangle waves of whole numbers: a sine's last bit differs between processors, and with it the
    # digest of the picture.
    y, x = np.mgrid[0:height, 0:width]
    slopes = rng.integers(1, 9, size=(3, 2))
    waves = np.stack([abs((a * x + b * y) % 510 - 255) for a, b in slopes], axis=-1)
    rgb = np.uint8(share * noise + (1 - share) * waves)
    alpha = np.uint8(rng.integers(0, 256, size=(height, width)))
    picture = Image.fromarray(rgb)
    if mode in ("P", "P+alpha"):
        # A fixed palette and indices of our own: quantizing differs between versions of Pillow.
        picture = Image.fromarray(alpha)
        picture.putpalette(rng.integers(0, 256, size=768).astype(np.uint8).tobytes())
        if mode == "P+alpha":
            picture.info["transparency"] = bytes(range(256))
    elif mode == "RGBA":
        picture.putalpha(Image.fromarray(alpha))
    elif mode == "LA":
        picture = Image.merge("LA", (Image.fromarray(rgb[..., 0].copy()), Image.fromarray(alpha)))
    elif mode == "CMYK":
        picture = Image.merge("CMYK", [*picture.split(), Image.fromarray(alpha)])
    elif mode == "YCbCr":
        picture = Image.merge("YCbCr", picture.split())
    elif mode == "1":
        picture = Image.fromarray(np.uint8(rgb[..., 0] > 127) * 255).convert("1")
    elif mode == "L":
        picture = Image.fromarray(rgb[..., 0].copy())
    return picture


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, format=format, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(width: int, height: int, data: bytes, *before: bytes, depth: int = 8, color: int = 2) -> bytes:
    """A PNG whose header says what it is told to and whose pixels are `data`, compressed."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), *before, png_chunk(b"IDAT", zlib.compress(data, 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def truncatable() -> dict[str, bytes]:
    """One file a format, each 61 x 47 pixels of noise, for cutting off at any place."""
    rng = np.random.default_rng(5)
    picture = Image.fromarray(rng.integers(0, 256, size=(47, 61, 3), dtype=np.uint8))
    indexed = Image.fromarray(rng.integers(0, 256, size=(47, 61), dtype=np.uint8))
    indexed.putpalette(rng.integers(0, 256, size=768).astype(np.uint8).tobytes())
    files = {
        "jpg": encoded(picture, "JPEG", quality=90),
        "progressive.jpg": encoded(picture, "JPEG", quality=90, progressive=True),
        "png": encoded(picture, "PNG"),
        "gif": encoded(indexed, "GIF"),
        "bmp": encoded(picture, "BMP"),
        "tif": encoded(picture, "TIFF"),
        "ppm": encoded(picture, "PPM"),
    }
    if features.check("webp"):
        files["webp"] = encoded(picture, "WEBP", lossless=True)
    if features.check("libtiff"):
        files["lzw.tif"] = encoded(picture, "TIFF", compression="tiff_lzw")
    return files


def with_orientation(picture: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, "JPEG", quality=95, exif=exif.tobytes())


def without_adobe(jpeg: bytes) -> bytes:
    """The same JPEG without its APP14 marker, which says how CMYK is stored."""
    start = jpeg.index(b"\xff\xee")
    length = struct.unpack(">H", jpeg[start + 2 : start + 4])[0]
    return jpeg[:start] + jpeg[start + 2 + length :]


def as_ycck(jpeg: bytes) -> bytes:
    """The same JPEG with the Adobe transform 2: its four components are read as YCCK."""
    start = jpeg.index(b"Adobe") + 11
    return jpeg[:start] + b"\x02" + jpeg[start + 1 :]


def _good_files() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(smooth(60, 40))
    gray = rgb.convert("L")
    alpha = Image.fromarray(rng.integers(0, 256, size=(40, 60), dtype=np.uint8))
    translucent = rgb.copy()
    translucent.putalpha(alpha)
    deep = Image.fromarray(rng.integers(0, 65536, size=(40, 60), dtype=np.uint16))
    float_gray = Image.fromarray(rng.uniform(0, 1, size=(40, 60)).astype(np.float32))
    cmyk = Image.merge("CMYK", [*rgb.split(), gray])
    palette = rgb.quantize(16)
    yield "plain.jpg", encoded(rgb, "JPEG")
    yield "plain.png", encoded(rgb, "PNG")
    yield "plain.bmp", encoded(rgb, "BMP")
    yield "plain.ppm", encoded(rgb, "PPM")
    yield "plain.tif", encoded(rgb, "TIFF")
    yield "really-a-jpeg.png", encoded(rgb, "JPEG")
    yield "really-a-png.jpg", encoded(rgb, "PNG")
    yield "no-suffix", encoded(rgb, "PNG")
    yield "gray.jpg", encoded(gray, "JPEG")
    yield "progressive.jpg", encoded(rgb, "JPEG", progressive=True)
    yield "one-bit.png", encoded(gray.convert("1"), "PNG")
    yield "rgba.png", encoded(translucent, "PNG")
    yield "gray-alpha.png", encoded(translucent.convert("LA"), "PNG")
    yield "palette.png", encoded(palette, "PNG")
    yield "palette-one-clear.png", encoded(palette, "PNG", transparency=0)
    yield "palette-alpha.png", encoded(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    yield "rgb-one-clear.png", encoded(rgb, "PNG", transparency=(1, 2, 3))
    yield "sixteen-bit.png", encoded(deep, "PNG")
    yield "sixteen-bit.tif", encoded(deep, "TIFF")
    sixteen = rng.integers(0, 256, size=(40, 1 + 60 * 6), dtype=np.uint8)
    sixteen[:, 0] = 0  # the filter type of each row
    yield "sixteen-bit-rgb.png", png(60, 40, sixteen.tobytes(), depth=16)
    yield "float.tif", encoded(float_gray, "TIFF")
    yield "int32.tif", encoded(Image.fromarray(np.int32(np.asarray(deep)) * 1000 - 7), "TIFF")
    yield "cmyk.tif", encoded(cmyk, "TIFF")
    adobe = encoded(cmyk, "JPEG", quality=95)
    yield "cmyk-inverted.jpg", adobe
    yield "cmyk-plain.jpg", without_adobe(adobe)
    yield "ycck.jpg", as_ycck(adobe)
    for orientation in range(1, 9):
        yield f"orientation-{orientation}.jpg", with_orientation(rgb, orientation)
    yield "orientation-99.jpg", with_orientation(rgb, 99)
    yield (
        "exif-garbage.jpg",
        encoded(rgb, "JPEG", exif=b"Exif\0\0MM\0*" + bytes(rng.integers(0, 256, 200, "u1"))),
    )
    yield "exif-cut.jpg", encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    yield "icc-garbage.jpg", encoded(rgb, "JPEG", icc_profile=b"not a profile" * 9)
    yield "icc-garbage.png", encoded(rgb, "PNG", icc_profile=b"not a profile" * 9)
    frames = [Image.fromarray(smooth(60, 40, seed)) for seed in range(3)]
    animation: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 40}
    yield "animated.gif", encoded(frames[0], "GIF", **animation)
    yield "animated.png", encoded(frames[0], "PNG", **animation)
    if int(PIL.__version__.partition(".")[0]) >= 11:  # before, Pillow could not read what it wrote
        yield "stereo.mpo", encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    if features.check("webp"):
        yield "plain.webp", encoded(rgb, "WEBP")
        yield "alpha.webp", encoded(translucent, "WEBP")
        yield "animated.webp", encoded(frames[0], "WEBP", **animation)
    Image.init()
    if "AVIF" in Image.SAVE:
        yield "plain.avif", encoded(rgb, "AVIF")
    if features.check("jpg_2000"):
        yield "plain.jp2", encoded(rgb, "JPEG2000")
    yield "icon.ico", encoded(rgb, "ICO", sizes=[(16, 16), (32, 32)])
    yield "trailing-garbage.png", encoded(rgb, "PNG") + b"\0garbage" * 50
    yield "trailing-garbage.jpg", encoded(rgb, "JPEG") + b"\0garbage" * 50
    # Whole as a file, but its stream ends early: every PNG reader fills the rest.
    yield "short-stream.png", png(60, 40, bytes(181 * 20))
    yield "one-pixel.png", encoded(rgb.resize((1, 1)), "PNG")
    yield "one-pixel.gif", encoded(palette.resize((1, 1)), "GIF")
    yield "one-pixel.jpg", encoded(rgb.resize((1, 1)), "JPEG")
    yield "tall.png", encoded(rgb.resize((1, 4000)), "PNG")
    yield "wide.jpg", encoded(rgb.resize((4000, 1)), "JPEG")
    yield "strip.png", png(1, 50_000, b"\0abc" * 50_000)
    yield "palette-strip.png", png(50_000, 1, bytes(50_001), png_chunk(b"PLTE", b"\1\2\3"), color=3)
    yield "ünïcödé – 写真 🐈.png", encoded(rgb, "PNG")
    yield "two\nlines\tand \x1b[31mcolor.png", encoded(rgb, "PNG")
    yield "x" * 200 + ".png", encoded(rgb, "PNG")
    yield " blanks ; $(touch gone) .png", encoded(rgb, "PNG")


def _bad_files() -> Iterator[tuple[str, bytes, str]]:
    rng = np.random.default_rng(2)
    rgb = Image.fromarray(smooth(60, 40))
    whole_png, whole_jpeg = encoded(rgb, "PNG"), encoded(rgb, "JPEG")
    yield "empty.jpg", b"", "an empty file"
    yield "zeros.png", bytes(4000), "nothing but zeros"
    yield "text.jpg", b"this is not a picture\n", "found text"
    yield "long-text.jpg", "Grüße, 世界. ".encode() * 300, "found text"
    yield "json.png", b'{"error": "not found"}', "found text"
    yield "page.png", b"\n<!DOCTYPE html><html><body>404</body></html>", "found HTML"
    yield "drawing.png", b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "found SVG"
    yield "data.jpg", b"<?xml version='1.0'?><a/>", "found XML"
    yield "paper.png", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "found PDF"
    yield "script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "found PostScript"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", whole_png)
    yield "archive.png", archive.getvalue(), "found a zip archive"
    yield "packed.png", gzip.compress(whole_png), "found a gzip archive"
    yield "video.jpg", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(99), "video"
    yield "pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"
    yield "noise.jpg", b"\x07" + bytes(rng.integers(0, 256, 5000, "u1")), "found bytes 07"
    yield "only-a-signature.png", whole_png[:8], "PNG"
    yield "only-a-signature.jpg", whole_jpeg[:3], "JPEG"
    header_end = whole_png.index(b"IDAT") - 4
    yield "no-pixels.png", whole_png[:header_end] + png_chunk(b"IEND", b""), "PNG"
    broken = bytearray(whole_png)
    broken[header_end + 20] ^= 0xFF
    yield "crc.png", bytes(broken), "PNG"
    yield "header-crc.png", whole_png[:29] + b"\0\0\0\0" + whole_png[33:], "PNG"
    yield "not-deflate.png", png(60, 40, b"").replace(zlib.compress(b"", 9), b"\xff" * 8), "PNG"
    yield "no-size.png", png(0, 40, b""), "PNG"
    text_bomb = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27), 9))
    yield "text-bomb.png", png(60, 40, bytes(181 * 40), text_bomb), "PNG"
    # Headers that claim far more than there is.
    yield "huge.png", png(HUGE, HUGE, b""), "refused"
    frame = whole_jpeg.index(b"\xff\xc0") + 5
    yield "huge.jpg", whole_jpeg[:frame] + struct.pack(">HH", HUGE, HUGE) + whole_jpeg[frame + 4 :], "refused"
    bmp = encoded(rgb, "BMP")
    yield "huge.bmp", bmp[:18] + struct.pack("<ii", HUGE, HUGE) + bmp[26:], "refused"
    gif = encoded(rgb.quantize(4), "GIF")
    yield "huge.gif", gif[:6] + struct.pack("<HH", HUGE, HUGE) + gif[10:], "refused"
    corner = gif.index(b",\0\0\0\0\x3c\0\x28\0")
    frame_size = b",\0\0\0\0" + struct.pack("<HH", HUGE, HUGE)
    yield "huge-frame.gif", gif[:corner] + frame_size + gif[corner + 9 :], "refused"
    yield "huge.ppm", f"P6 {HUGE} {HUGE} 255\n".encode() + bytes(99), "refused"
    tags = ((256, HUGE), (257, HUGE), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, HUGE), (279, 9))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    yield "huge.tif", b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4), "refused"
    if features.check("webp"):
        dimensions = (16_383).to_bytes(3, "little") * 2
        chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + dimensions
        still = encoded(rgb, "WEBP", lossless=True)[12:]
        body = b"WEBP" + chunk + still
        yield "huge.webp", b"RIFF" + struct.pack("<I", len(body)) + body, ""
    # A whole, valid picture of 400 million pixels in a few kilobytes.
    rows = zlib.compressobj(9)
    stream = b"".join(rows.compress(bytes(2501 * 1000)) for _ in range(20)) + rows.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    bomb = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", stream) + png_chunk(b"IEND", b"")
    yield "bomb.png", b"\x89PNG\r\n\x1a\n" + bomb, "refused"
    inner = png(HUGE, HUGE, b"")
    directory = struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(inner), 22)
    yield "bomb.ico", directory + inner, "refused"
    for name, data in truncatable().items():
        for share in (0.1, 0.5, 0.9):
            yield f"cut-{share:.0%}.{name}", data[: int(len(data) * share)], ""


def write_hostile(folder: Path) -> list[Case]:
    """Write all of them into `folder` and say what to expect. More than a hundred cases."""
    cases = []
    for name, data in _good_files():
        path = folder / name
        path.write_bytes(data)
        cases.append(Case(path, good=True))
    for name, data, message in _bad_files():
        path = folder / name
        path.write_bytes(data)
        cases.append(Case(path, good=False, message=message))

    def bad(name: str, make: Callable[[Path], object], message: str) -> None:
        make(folder / name)
        cases.append(Case(folder / name, good=False, message=message))

    bad("missing.jpg", lambda path: None, "no such file")
    bad("folder.jpg", Path.mkdir, "a folder")
    if sys.platform != "win32":
        cases.append(Case(folder / ("y" * 300 + ".jpg"), good=False, message="cannot be opened"))
        cases.append(Case(folder / "nul\0byte.jpg", good=False, message="cannot be opened"))
        bad("broken-link.jpg", lambda path: path.symlink_to("nowhere.jpg"), "does not exist")
        bad("loop.jpg", lambda path: path.symlink_to("loop.jpg"), "cannot be opened")
        bad("pipe.jpg", os.mkfifo, "a pipe")
        bad("device.jpg", lambda path: path.symlink_to("/dev/zero"), "a device")
        if os.geteuid() != 0:

            def locked(path: Path) -> None:
                path.write_bytes(b"")
                path.chmod(0)

            bad("locked.jpg", locked, "no permission")
        (folder / "link.png").symlink_to("plain.png")
        cases.append(Case(folder / "link.png", good=True))
    return cases
