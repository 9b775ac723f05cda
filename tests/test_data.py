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


# Calibration: inputs without labels


def grey(path: Path, count: int = 3, size: int = 6) -> None:
    """Image files in a folder."""
    path.mkdir(exist_ok=True)
    for number, image in enumerate(images(count, size)):
        Image.fromarray(image[..., 0]).save(path / f"{number}.png")


def test_calibration_takes_all_inputs_of_the_training_side_with_their_labels(tmp_path: Path) -> None:
    x, y = images(10), np.arange(10) % 3
    split = save(tmp_path / "split.npz", x_train=x[:7], y_train=y[:7], x_test=x[7:], y_test=y[7:])
    whole = save(tmp_path / "whole.npz", x=x, y=y)
    for path, count in ((split, 7), (whole, 10)):
        inputs, labels, classes = data.calibration(path)
        assert np.array_equal(inputs, x[:count])
        assert labels is not None
        assert np.array_equal(labels, y[:count])
        assert classes == ()


def test_calibration_with_digits_never_sees_their_test_side() -> None:
    digits = data.load("digits")
    inputs, labels, classes = data.calibration("digits")
    assert np.array_equal(inputs, digits.x_train)
    assert labels is not None
    assert np.array_equal(labels, digits.y_train)
    assert classes == digits.classes


@pytest.mark.parametrize("key", ["x", "x_train"])
def test_an_archive_of_inputs_alone_calibrates_without_labels(tmp_path: Path, key: str) -> None:
    inputs, labels, classes = data.calibration(save(tmp_path / "a.npz", **{key: images(8)}))
    assert np.array_equal(inputs, images(8))
    assert labels is None
    assert classes == ()


def test_labels_of_the_other_side_are_not_taken_for_those_of_the_inputs(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x_train=images(8), y=np.arange(8), y_test=np.arange(8))
    assert data.calibration(path)[1] is None


@pytest.mark.parametrize(("inputs", "key"), [("x", "groups"), ("x_train", "groups_train")])
def test_an_archive_may_say_which_inputs_belong_together(tmp_path: Path, inputs: str, key: str) -> None:
    path = save(tmp_path / "a.npz", **{inputs: images(8), key: np.arange(8, dtype=np.uint8) // 2})
    found = data.groups(path, 8)
    assert found is not None
    assert found.dtype == np.int64
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_source_that_does_not_say_so_has_no_groups(tmp_path: Path) -> None:
    assert data.groups("digits", 8) is None
    assert data.groups(save(tmp_path / "a.npz", x=images(8)), 8) is None


def test_groups_under_the_name_of_other_inputs_are_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected groups_train"):
        data.groups(save(tmp_path / "b.npz", x_train=images(8), groups=np.arange(8)), 8)


@pytest.mark.parametrize("groups", [np.arange(7), np.zeros((8, 1), np.int64), np.linspace(0, 1, 8)])
def test_groups_that_are_none_are_refused(tmp_path: Path, groups: np.ndarray) -> None:
    with pytest.raises(ModelError, match="groups in"):
        data.groups(save(tmp_path / "a.npz", x=images(8), groups=groups), 8)


def test_an_array_file_calibrates_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images(8)[..., 0])
    inputs, labels, classes = data.calibration(str(tmp_path / "a.npy"))
    assert np.array_equal(inputs, images(8))
    assert labels is None
    assert classes == ()


def test_a_flat_folder_of_images_calibrates_without_labels(tmp_path: Path) -> None:
    grey(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    inputs, labels, classes = data.calibration(str(tmp_path))
    assert np.array_equal(inputs, images(3))
    assert labels is None
    assert classes == ()


def test_a_picture_is_read_as_a_person_sees_it(tmp_path: Path) -> None:
    upright = images(1)[0, ..., 0]
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: the first row is the right-hand side
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=turned)
    Image.fromarray(upright.astype(np.uint16) << 8).save(tmp_path / "b.png")
    inputs, _, _ = data.calibration(str(tmp_path))
    assert np.array_equal(inputs[..., 0], np.stack([upright, upright]))


def test_a_folder_per_class_calibrates_with_names_and_labels(tmp_path: Path) -> None:
    grey(tmp_path / "stop", 2)
    grey(tmp_path / "yield", 3)
    inputs, labels, classes = data.calibration(str(tmp_path))
    assert len(inputs) == 5
    assert labels is not None
    assert labels.tolist() == [0, 0, 1, 1, 1]
    assert classes == ("stop", "yield")


def test_images_beside_class_folders_are_refused_for_calibration(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "stop", tmp_path / "yield"):
        grey(folder)
    with pytest.raises(ModelError, match="3 images beside 2 subfolders"):
        data.calibration(str(tmp_path))


@pytest.mark.parametrize("case", ["empty", "broken image", "two sizes"])
def test_a_flat_folder_that_cannot_be_used_is_refused(tmp_path: Path, case: str) -> None:
    if case == "broken image":
        (tmp_path / "x.png").write_bytes(b"no image")
    if case == "two sizes":
        for name, size in (("a", 5), ("b", 6)):
            Image.fromarray(images(1, size)[0, ..., 0]).save(tmp_path / f"{name}.png")
    with pytest.raises(ModelError):
        data.calibration(str(tmp_path))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(8), r"\[N, \.\.\.\]"),
        (np.zeros((0, 3)), "N > 0"),
        (np.full((8, 3), np.inf), "finite"),
        (np.zeros((8, 3), complex), "uint8 images or numbers"),
        (np.zeros((8, 3), "timedelta64[s]"), "uint8 images or numbers"),
        (np.zeros((8, 3), bool), "uint8 images or numbers"),
        (np.array([{}] * 8)[:, None], "plain array"),
    ],
)
def test_an_array_file_that_does_not_fit_is_refused_with_what_is_wrong(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ModelError, match=message):
        data.calibration(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16, np.int64])
def test_numbers_that_are_no_pixels_become_float32(tmp_path: Path, dtype: type) -> None:
    x: np.ndarray = np.arange(-12, 12).reshape(8, 3).astype(dtype)
    np.save(tmp_path / "a.npy", x)
    inputs, _, _ = data.calibration(str(tmp_path / "a.npy"))
    assert inputs.dtype == np.float32
    assert np.array_equal(inputs, x)


@pytest.mark.filterwarnings("error")
def test_a_number_beyond_float32_is_refused_and_does_not_become_infinite(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((8, 3), 1e39))
    with pytest.raises(ModelError, match="beyond float32"):
        data.calibration(str(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_test": images(8)}, "x_train or x"),
        ({"x": images(8), "y": np.arange(7)}, "one label per input"),
    ],
)
def test_an_archive_that_cannot_calibrate_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        data.calibration(save(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("source", ["no-such-set", "no/such/file.npz", "no/such/file.npy"])
def test_calibration_data_that_is_not_there_is_refused_by_its_name(source: str) -> None:
    with pytest.raises(ConfigError, match=source):
        data.calibration(source)


def test_data_without_labels_trains_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images(8))
    with pytest.raises(ModelError, match="y_train"):
        data.load(str(tmp_path / "a.npy"))


@given(content=st.binary(max_size=400))
def test_random_bytes_are_no_array_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("random") / "a.npy"
    for raw in (content, b"\x93NUMPY\x01\x00" + content, b"\x93NUMPY\x01\x00\x76\x00{'descr': " + content):
        path.write_bytes(raw)
        with pytest.raises(ModelError):
            data.calibration(str(path))


# Labels and class names in files of their own


@pytest.mark.parametrize("text", ["0\n2\n1\n", "0\r\n2\r\n1\r\n\r\n", "\ufeff0\n 2\t\n1"])
def test_labels_are_read_from_a_text_file_with_one_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode())
    labels = data.read_labels(tmp_path / "labels.csv", 3)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 2, 1]


def test_labels_are_read_from_an_array_file(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([0, 2, 1], dtype=np.uint8))
    labels = data.read_labels(tmp_path / "labels.npy", 3)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0\n1\n", r"labels of shape \[2\]; expected one label per input, \[3\]"),
        (b"", r"labels of shape \[0\]"),
        (b"0\n\n1\n", "'' in line 2"),
        (b"label\n0\n1\n", "'label' in line 1"),
        (b"0\n1,1\n2\n", "'1,1' in line 2"),
        (b"0\n-1\n2\n", "'-1' in line 2"),
        (b"0\n1.0\n2\n", "'1.0' in line 2"),
        (b"0\n" + b"9" * 9999 + b"\n2\n", "in line 2"),
        ("0\n\u0663\n2\n".encode(), "in line 2"),
        (b"0\n4096\n2\n", "at most 4096 classes"),
        (b"\xff\xfe0\n", "UTF-8"),
    ],
)
def test_a_label_file_that_does_not_fit_is_refused_with_what_is_wrong(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        data.read_labels(tmp_path / "labels.txt", 3)


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((3, 1), int), np.full(3, -1), np.zeros(3, "timedelta64[s]")])
def test_an_array_that_holds_no_labels_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "labels.npy", array)
    with pytest.raises(ModelError, match="label"):
        data.read_labels(tmp_path / "labels.npy", 3)


@pytest.mark.parametrize("text", ["stop\ngive way\nÜberholen\n", "stop\r\n give way\t\r\nÜberholen\r\n\r\n \r\n"])
def test_class_names_stand_one_a_line_in_the_order_of_the_classes(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.txt").write_bytes(text.encode())
    assert data.read_class_names(tmp_path / "labels.txt") == ("stop", "give way", "Überholen")


def test_two_classes_may_have_one_name(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("???\nstop\n???\n")
    assert data.read_class_names(tmp_path / "labels.txt") == ("???", "stop", "???")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 names"),
        (b"\n \n", "0 names"),
        (b"a\n\nb\n", "'' in line 2"),
        ("a\n\u3000\n".encode() + b"b", "in line 2"),
        (b"a\n" * 4097, "4097 names"),
        (b"a\n" + b"b" * 201, "in line 2"),
        (b"a\nb\x1b[31m\n", "control character"),
        (b"a\nb\rc\n", "control character"),
        (b"a\nb\x0bc\n", "control character"),
        ("a\nb\u2028c\n".encode(), "control character"),
        (b"a\n\xff\n", "UTF-8"),
    ],
)
def test_a_list_of_class_names_that_cannot_be_used_is_refused_with_what_is_wrong(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        data.read_class_names(tmp_path / "labels.txt")


def test_no_more_of_a_list_is_read_than_a_list_may_have(tmp_path: Path) -> None:
    with (tmp_path / "labels.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="more than"):
        data.read_class_names(tmp_path / "labels.txt")


@pytest.mark.parametrize("name", ["labels.txt", "labels.npy"])
def test_a_list_that_is_not_there_is_refused_by_its_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        data.read_labels(tmp_path / name, 3)
    with pytest.raises(ConfigError, match=name):
        data.read_class_names(tmp_path / name)


@given(content=st.binary(max_size=200))
def test_random_bytes_are_labels_or_names_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("random")
    for name in ("labels.txt", "labels.npy"):
        (folder / name).write_bytes(content)
        with contextlib.suppress(ModelError):
            assert len(data.read_labels(folder / name, 3)) == 3
        with contextlib.suppress(ModelError):
            assert all(name.strip() for name in data.read_class_names(folder / name))
