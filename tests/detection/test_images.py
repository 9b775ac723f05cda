"""Images to inputs: what a file becomes, and what a hostile one cannot do."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeguard import data
from edgeguard.contract.guard import ModelInput
from edgeguard.detection import images
from edgeguard.detection.images import MAX_PIXELS, MAX_SCANS
from edgeguard.errors import ModelError

ORIENTATION = 0x0112


def colour(height: int = 6, width: int = 8) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


GREY = colour()[..., 0]


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def of(array: npt.NDArray[Any], kind: str = "PNG", **how: Any) -> bytes:
    return saved(Image.fromarray(array), kind, **how)


def taking(*shape: int, dtype: Any = "uint8", values: tuple[float, float] = (0.0, 255.0)) -> ModelInput:
    return ModelInput(shape=shape, dtype=dtype, range=values)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def png(width: int, height: int, content: bytes, *, depth: int = 8, kind: int = 0) -> bytes:
    """A PNG by hand, whatever Pillow would write."""
    header = struct.pack(">2L5B", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


# What a file becomes


def test_an_image_of_the_models_own_size_stays_as_it_is() -> None:
    assert np.array_equal(images.decode(of(colour()), taking(6, 8, 3)), colour())
    assert np.array_equal(images.decode(of(GREY), taking(6, 8, 1)), GREY[..., np.newaxis])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [*((mode, "png") for mode in ("L", "RGB", "1", "LA", "RGBA", "P")), ("L", "jpg"), ("RGB", "jpg"), ("CMYK", "jpg")],
)
def test_an_image_of_the_models_own_size_gives_what_a_folder_of_images_gives(
    tmp_path: Path, mode: str, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    alpha = Image.fromarray(GREY[::-1])
    picture = Image.fromarray(colour())
    if mode in {"LA", "RGBA"}:
        picture.putalpha(alpha)
    picture.convert(mode).save(path)
    (found,), _, _ = data.calibration(str(tmp_path))
    assert np.array_equal(images.decode(path.read_bytes(), taking(*found.shape)), found)


@pytest.mark.parametrize("size", [(3, 4), (12, 16), (5, 9)])
def test_another_size_is_reached_by_the_filter_that_averages_what_each_pixel_covers(size: tuple[int, int]) -> None:
    found = images.decode(of(colour(60, 80)), taking(*size, 3))
    whole = Image.fromarray(colour(60, 80)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    assert np.array_equal(found, np.asarray(whole))


def test_a_fine_pattern_becomes_its_mean_and_not_one_of_its_colours() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 254
    assert np.abs(images.decode(of(stripes), taking(4, 4, 1))[:, 1:-1].astype(int) - 127).max() <= 1


def halves() -> npt.NDArray[np.uint8]:
    """A wide picture, dark on the left."""
    found = np.zeros((10, 40), np.uint8)
    found[:, 20:] = 200
    return found


def test_the_whole_image_is_taken_and_the_aspect_ratio_is_not_kept() -> None:
    assert images.decode(of(halves()), taking(2, 4, 1))[:, [0, 3], 0].tolist() == [[0, 200]] * 2


@pytest.mark.parametrize(
    ("orientation", "row"),
    [(1, "ab"), (2, "ba"), (3, "dc"), (4, "cd"), (5, "ac"), (6, "ca"), (7, "db"), (8, "bd"), (9, "ab")],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_is_turned_as_its_exif_says(orientation: int, row: str, kind: str) -> None:
    quarters = np.array([[20, 90], [160, 230]], np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = images.decode(of(quarters, kind, exif=exif), taking(32, 32, 1))
    upright = {"a": 20, "b": 90, "c": 160, "d": 230}
    assert [abs(int(found[8, x, 0]) - upright[name]) <= 3 for x, name in zip((8, 24), row, strict=True)] == [True] * 2


def test_a_picture_is_turned_before_it_is_brought_to_size() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert images.decode(of(halves(), exif=exif), taking(4, 2, 1))[[0, 3], :, 0].tolist() == [[0, 0], [200, 200]]


def test_grey_is_given_three_times_to_a_model_of_colour() -> None:
    assert np.array_equal(images.decode(of(GREY), taking(6, 8, 3)), np.stack([GREY] * 3, axis=-1))


def test_colour_becomes_its_luma_for_a_model_of_grey() -> None:
    luma = colour() @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(images.decode(of(colour()), taking(6, 8, 1))[..., 0] - luma).max() <= 1


def test_transparency_is_dropped_and_not_composited() -> None:
    alpha = np.zeros((6, 8, 1), np.uint8)
    assert np.array_equal(images.decode(of(np.concatenate([colour(), alpha], axis=-1)), taking(6, 8, 3)), colour())
    assert np.array_equal(images.decode(of(GREY, transparency=int(GREY[0, 0])), taking(6, 8, 1))[..., 0], GREY)


def test_a_palette_is_looked_up_and_its_transparency_dropped(recwarn: pytest.WarningsRecorder) -> None:
    palette = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) % 3, mode="P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = images.decode(saved(palette, transparency=b"\x00\x80\xff"), taking(6, 8, 3))
    assert found[0, :3].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert not recwarn.list


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_of_16_bits_the_upper_8_count(kind: int, channels: int) -> None:
    values = np.arange(4 * 4 * channels, dtype=np.uint16).reshape(4, 4 * channels) * 1000
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    found = images.decode(png(4, 4, rows, depth=16, kind=kind), taking(4, 4, 3 if channels >= 3 else 1))
    upper = (values >> 8).astype(np.uint8).reshape(4, 4, channels)
    assert np.array_equal(found, upper[..., : found.shape[2]])


def test_of_an_animation_the_first_image_counts() -> None:
    frames = [Image.fromarray(np.full((6, 8), value, np.uint8)) for value in (10, 200)]
    animated = saved(frames[0], save_all=True, append_images=frames[1:])
    assert images.decode(animated, taking(6, 8, 1)).max() == 10


# Types and ranges


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("uint8", (0.0, 255.0), [0, 51, 255]),
        ("float32", (0.0, 1.0), [0.0, 0.2, 1.0]),
        ("float32", (-1.0, 1.0), [-1.0, -0.6, 1.0]),
        ("float32", (0.0, 255.0), [0.0, 51.0, 255.0]),
        ("int8", (-128.0, 127.0), [-128, -77, 127]),
        ("int8", (-1.0, 1.0), [-1, -1, 1]),
        ("int8", (-500.0, 500.0), [-128, -128, 127]),
        ("int16", (0.0, 1000.0), [0, 200, 1000]),
    ],
)
def test_pixels_are_mapped_to_the_models_type_and_range(
    dtype: str, values: tuple[float, float], expected: list[float]
) -> None:
    found = images.decode(of(np.array([[0, 51, 255]], np.uint8)), taking(1, 3, 1, dtype=dtype, values=values))
    assert found.dtype == dtype
    assert found.shape == (1, 3, 1)
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (8, 8, 2), (8, 8, 4), (1, 8, 8, 3), ()])
def test_a_model_that_takes_no_images_is_told_so(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"model input.*\[H, W, C\]"):
        images.decode(of(GREY), taking(*shape))


# Hostile files

TARGET = taking(5, 7, 3)
EXIF = Image.Exif()
EXIF[ORIENTATION] = 6
SOUND = {
    "png": of(colour(), exif=EXIF),
    "palette": saved(Image.fromarray(colour()).quantize(16), transparency=b"\x00\x80"),
    "16-bit": of(GREY.astype(np.uint16) * 257),
    "jpeg": of(colour(), "JPEG", exif=EXIF),
    "progressive": of(colour(24, 24), "JPEG", progressive=True),
    "cmyk": saved(Image.fromarray(colour()).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_are_decoded(name: str) -> None:
    assert images.decode(SOUND[name], TARGET).shape == TARGET.shape


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds odd
@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SOUND)),
    start=st.floats(0.0, 1.0),
    skipped=st.integers(0, 8),
    inserted=st.binary(max_size=8),
    cut=st.floats(0.1, 1.0),
)
@example(name="jpeg", start=1.0, skipped=0, inserted=b"", cut=0.5)
def test_damaged_files_are_decoded_or_one_error(
    name: str, start: float, skipped: int, inserted: bytes, cut: float
) -> None:
    content = SOUND[name]
    at = int(start * len(content))
    damaged = content[:at] + inserted + content[at + skipped :]
    try:
        found = images.decode(damaged[: int(cut * len(damaged)) + 1], TARGET)
    except ModelError as error:
        assert "JPEG or PNG" in str(error)
        return
    assert found.shape == TARGET.shape


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(st.sampled_from([b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"zTXt"])),
    content=st.binary(max_size=60),
    data_=st.data(),
)
def test_chunks_with_sound_checksums_and_any_content_are_decoded_or_one_error(
    kinds: list[bytes], content: bytes, data_: st.DataObject
) -> None:
    sound = SOUND["palette"]
    end = sound.index(b"IDAT") - 4
    added = b"".join(chunk(kind, data_.draw(st.just(content) | st.binary(max_size=30))) for kind in kinds)
    try:
        found = images.decode(sound[:end] + added + sound[end:], TARGET)
    except ModelError:
        return
    assert found.shape == TARGET.shape


@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=b"GIF89a" + bytes(100))
def test_other_bytes_are_no_image(content: bytes) -> None:
    for start in (b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ModelError, match="image; got"):
            images.decode(start + content, TARGET)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_other_formats_never_reach_a_decoder(kind: str) -> None:
    with pytest.raises(ModelError, match="begin like neither"):
        images.decode(of(colour(), kind), TARGET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (5100, 5000), (2**31 - 1, 2**31 - 1), (0, 8), (8, 0)])
def test_a_bomb_and_nothing_are_refused_by_their_header(size: tuple[int, int]) -> None:
    hostile = png(*size, bytes(64))
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=r"pixels|neither"):
            images.decode(hostile, TARGET)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def with_scans(count: int) -> bytes:
    """A progressive JPEG that asks for one of its scans again and again."""
    sound = of(np.full((64, 64), 128, np.uint8), "JPEG", progressive=True)
    starts = [at for at in range(len(sound)) if sound.startswith(b"\xff\xda", at)]
    last = sound[starts[-1] : -2]
    return sound[:-2] + last * (count - len(starts)) + sound[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_takes_time() -> None:
    assert images.decode(with_scans(MAX_SCANS), taking(4, 4, 1)).mean() == pytest.approx(128, abs=1)
    with pytest.raises(ModelError, match="scans"):
        images.decode(with_scans(MAX_SCANS + 1), taking(4, 4, 1))


def test_a_png_whose_bytes_look_like_scans_is_none() -> None:
    text = chunk(b"prVt", b"\xff\xda" * (MAX_SCANS + 1))
    sound = of(colour())
    end = sound.index(b"IDAT") - 4
    assert np.array_equal(images.decode(sound[:end] + text + sound[end:], taking(6, 8, 3)), colour())
