"""The data loader: what it accepts, how it splits, what it refuses."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeguard import data
from edgeguard.errors import ConfigError, EdgeGuardError, ModelError


def images(count: int, size: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_digits_are_pixels_with_a_fixed_split() -> None:
    one, other = data.load("digits", seed=0), data.load("digits", seed=5)
    assert one.shape == (8, 8, 1)
    assert one.x_train.dtype == np.uint8
    assert int(one.x_train.max()) == 255
    assert np.array_equal(one.x_test, other.x_test)
    assert len(one.x_train) + len(one.x_test) == 1797


def test_a_name_is_looked_up_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "mine.npz", x=images(8), y=np.arange(8) % 2)
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    assert data.load("mine").name == "mine"


def test_grey_images_without_a_channel_axis_get_one(tmp_path: Path) -> None:
    loaded = data.load(save(tmp_path / "a.npz", x=images(8)[..., 0], y=np.arange(8)))
    assert loaded.shape == (6, 6, 1)


def test_data_that_came_split_keeps_its_split(tmp_path: Path) -> None:
    x = images(10)
    path = save(tmp_path / "a.npz", x_train=x[:7], y_train=np.zeros(7, int), x_test=x[7:], y_test=np.ones(3, int))
    assert np.array_equal(data.load(path).x_test, x[7:])
    assert np.array_equal(data.pool(path, "train").x_train, x[:7])
    assert np.array_equal(data.pool(path, "test").x_test, x[7:])


def test_pooling_data_that_came_whole_gives_every_input_on_both_sides(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=images(10), y=np.arange(10) % 3)
    assert len(data.pool(path, "train").x_train) == len(data.pool(path, "test").x_test) == 10


def test_a_folder_of_images_has_a_class_per_subfolder(tmp_path: Path) -> None:
    for name in ("stop", "yield"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(images(1)[0, ..., 0]).save(tmp_path / name / f"{i}.png")
    (tmp_path / "stop" / "notes.txt").write_text("not an image")
    loaded = data.load(str(tmp_path))
    assert loaded.classes == ("stop", "yield")
    assert len(loaded.x_train) + len(loaded.x_test) == 6


def test_held_out_inputs_of_sorted_data_come_from_the_end_of_each_class(tmp_path: Path) -> None:
    # Two classes of 50; the pixel value says where an input stood, as a frame number would.
    x = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    path = save(tmp_path / "a.npz", x_train=x, y_train=np.repeat([0, 1], 50), x_test=x[:2], y_test=np.array([0, 1]))
    rest, held, labels = data.hold_out(data.load(path), 20)
    assert sorted(held[:, 0, 0, 0]) == [*range(40, 50), *range(90, 100)]
    assert len(rest.x_train) == 80
    assert np.array_equal(np.sort(labels), np.repeat([0, 1], 10))


def test_held_out_inputs_are_disjoint_from_the_rest() -> None:
    digits = data.load("digits")
    rest, held, _ = data.hold_out(digits, 600)
    assert len(rest.x_train) + len(held) == len(digits.x_train)
    stacked = np.concatenate([rest.x_train, held]).reshape(len(digits.x_train), -1)
    original = digits.x_train.reshape(len(digits.x_train), -1)
    assert sorted(map(bytes, stacked)) == sorted(map(bytes, original))


def test_holding_out_more_than_half_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2000"):
        data.hold_out(data.load("digits"), 1000)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": images(8)}, "expected x_train"),
        ({"x": images(8), "y": np.zeros(7, int)}, "one label per input"),
        ({"x": images(8), "y": np.zeros(8)}, "class indices"),
        ({"x": images(8), "y": np.full(8, -1)}, "class indices"),
        ({"x": images(8), "y": np.full(8, 2**40)}, "at most 4096 classes"),
        ({"x": np.full((8, 3), np.nan), "y": np.zeros(8, int)}, "finite"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "N > 0"),
        ({"x": np.zeros((8, 3), complex), "y": np.zeros(8, int)}, "uint8 images or numbers"),
        ({"x": np.array(["a"] * 8)[:, None], "y": np.zeros(8, int)}, "uint8 images or numbers"),
        ({"x": np.array([{}] * 8)[:, None], "y": np.zeros(8, int)}, "plain arrays"),
        (
            {"x_train": images(4), "y_train": np.zeros(4, int), "x_test": images(2, 5), "y_test": np.zeros(2, int)},
            "one",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_what_is_wrong(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(ModelError, match=message):
        data.load(str(path))


@given(content=st.binary(max_size=400))
def test_random_bytes_are_no_data_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("random") / "a.npz"
    for raw in (content, b"PK\x03\x04" + content):
        path.write_bytes(raw)
        with pytest.raises(ModelError):
            data.load(str(path))


@given(data_=st.data())
def test_a_damaged_archive_is_refused_or_read_but_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data_: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    np.savez_compressed(path, x=images(8), y=np.arange(8))
    content = bytearray(path.read_bytes())
    for position in data_.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5)):
        content[position] = data_.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        assert data.load(str(path)).shape


@given(data_=st.data())
def test_a_damaged_image_is_refused_or_read_but_raises_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data_: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("images")
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(2):
            Image.fromarray(images(1)[0, ..., 0]).save(folder / name / f"{i}.png")
    path = folder / "a" / "0.png"
    content = bytearray(path.read_bytes())
    for position in data_.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data_.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        assert len(data.load(str(folder)).x_train)


def test_an_array_file_under_the_name_of_an_archive_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images(8))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(ModelError, match="npz archive"):
        data.load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("source", ["no-such-set", "no/such/file.npz"])
def test_an_unknown_source_is_refused_with_what_would_do(source: str) -> None:
    with pytest.raises(ConfigError) as caught:
        data.load(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("case", ["one class", "broken image", "two sizes", "no images"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, case: str) -> None:
    for name in ("a", "b")[: 1 if case == "one class" else 2]:
        (tmp_path / name).mkdir()
    if case == "broken image":
        (tmp_path / "a" / "x.png").write_bytes(b"no image")
    if case == "two sizes":
        for name, size in (("a", 5), ("b", 6)):
            Image.fromarray(images(1, size)[0, ..., 0]).save(tmp_path / name / "x.png")
    with pytest.raises(EdgeGuardError):
        data.load(str(tmp_path))
