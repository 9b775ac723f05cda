"""One loader for every data set: ``digits``, ``<name>.npz`` in ``EDGEGUARD_DATA``, an npz file, an image folder.

Calibration needs no labels: for it alone, an npz of inputs only, a ``.npy`` array or a flat folder of images will do.

Rules enforced here:

* images come out as ``uint8 [N, H, W, C]`` with values 0 to 255, other arrays as float32; labels as ``int64 [N]``;
* a data file is hostile: no pickled objects, shapes and types checked, every array finite, also as float32;
* held-out data never shares a source with training data: data that stands sorted by class (video tracks of one object,
  as in GTSRB) is split in whole runs, not image by image.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeguard.errors import ConfigError, ModelError

Array = npt.NDArray[np.generic]
Labels = npt.NDArray[np.int64]

ENVIRONMENT = "EDGEGUARD_DATA"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
TEST_SHARE = 0.25
MAX_CLASSES = 4096
MAX_NAME_LENGTH = 200
MAX_TEXT_BYTES = 16 << 20
_ARRAYS = frozenset({"x_train", "y_train", "x_test", "y_test", "x", "y", "groups", "groups_train"})
_CLASS_INDEX = re.compile("[0-9]{1,10}")
_BLANKS = " \t\r"
_UNPRINTED = frozenset({"Cc", "Zl", "Zp"})  # Unicode categories: control characters, line and paragraph separators

# NumPy documents this module but gives it no types.
_npy: Any = np.lib.format


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and test data of one task. ``x_*`` is ``[N, ...]``, ``y_*`` is ``int64 [N]``."""

    name: str
    x_train: Array
    y_train: Labels
    x_test: Array
    y_test: Labels
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""
        return tuple(self.x_train.shape[1:])

    @property
    def is_image(self) -> bool:
        """True for ``uint8 [N, H, W, C]``."""
        return self.x_train.dtype == np.uint8 and self.x_train.ndim == 4


@dataclass(frozen=True)
class _Whole:
    """A source that does not tell training from test data."""

    name: str
    x: Array
    y: Labels
    classes: tuple[str, ...]


def load(source: str, *, seed: int = 0) -> Dataset:
    """Load a data set by name or path.

    Args:
        source: ``digits``; the stem of a file in the folder that ``EDGEGUARD_DATA`` names; a path to an npz with
            ``x_train, y_train, x_test, y_test`` or ``x, y``; or a folder with one subfolder of images per class.
        seed: of the split, where the source has none.

    Raises:
        ConfigError: there is no such data set or file.
        ModelError: the file is there, but its content cannot be used.
    """
    found = _read(source)
    return _split(found, seed) if isinstance(found, _Whole) else found


def pool(source: str, side: Literal["train", "test"]) -> Dataset:
    """The inputs of one side of a source that came split, and all inputs, in their order, of one that did not.

    Both sides of the result hold these same inputs. Raises like :func:`load`.
    """
    found = _read(source)
    if isinstance(found, _Whole):
        x, y = found.x, found.y
    else:
        x, y = (found.x_train, found.y_train) if side == "train" else (found.x_test, found.y_test)
    return Dataset(name=found.name, x_train=x, y_train=y, x_test=x, y_test=y, classes=found.classes)


def calibration(source: str) -> tuple[Array, Labels | None, tuple[str, ...]]:
    """All inputs of a source's training side, in their order, to calibrate with.

    Args:
        source: as for :func:`load`; an npz with ``x_train`` or ``x`` alone; a ``.npy`` array; or a folder of images
            without subfolders.

    Returns:
        Inputs ``[N, ...]``; labels ``[N]``, None where the source has none; class names, empty where unknown.

    Raises:
        ConfigError: there is no such data set or file.
        ModelError: the file is there, but its content cannot be used.
    """
    path = _locate(source)
    if path is None:
        digits = _digits()
        return digits.x_train, digits.y_train, digits.classes
    if path.is_dir():
        return _calibration_folder(path)
    what, arrays = f"data file {path}", _arrays(path)
    side = "_train" if "x_train" in arrays else ""
    if f"x{side}" not in arrays:
        raise ModelError(what, got=f"arrays {_names(arrays)}", expected="x_train or x, and y_train or y where known")
    inputs = _inputs(what, arrays[f"x{side}"])
    truth = arrays.get(f"y{side}")
    return inputs, None if truth is None else _labels(what, truth, len(inputs)), ()


def groups(source: str, count: int) -> Labels | None:
    """Which inputs [count] of a source's training side belong together: ``groups_train`` or ``groups`` of its npz.

    Frames of one video, or pictures of one thing, are no independent inputs. None where the source does not tell.

    Raises:
        ConfigError: there is no such data set or file.
        ModelError: the file is there, but its groups cannot be used.
    """
    path = _locate(source)
    if path is None or path.suffix != ".npz":
        return None
    arrays = _arrays(path)
    name, what = "groups_train" if "x_train" in arrays else "groups", f"groups in {path}"
    found = arrays.get(name)
    if found is None:
        if {"groups", "groups_train"} & arrays.keys():
            raise ModelError(what, got=_names(arrays), expected=f"{name}, beside such inputs")
        return None
    if found.ndim != 1 or found.dtype.kind not in "iu" or len(found) != count:
        raise ModelError(
            what, got=f"{found.dtype}{list(found.shape)}", expected=f"a whole number for each of {count} inputs"
        )
    return found.astype(np.int64)


def read_labels(path: Path, count: int) -> Labels:
    """True labels ``[count]``: an integer array in a ``.npy`` file, or a text file with one class index a line.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
        ModelError: its content is no such list, or of another length.
    """
    what = f"label file {path}"
    if path.suffix == ".npy":
        _require(path, what)
        return _labels(what, _arrays(path)["x"], count)
    lines = _lines(path, what)
    for number, line in enumerate(lines, start=1):
        if not _CLASS_INDEX.fullmatch(line):
            raise ModelError(what, got=f"{line[:40]!r} in line {number}", expected="one class index from 0 a line")
    return _labels(what, np.asarray([int(line) for line in lines], dtype=np.int64), count)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names, one a line in the order of the classes, as TFLite's ``labels.txt``.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
        ModelError: its content is no such list.
    """
    what = f"class name file {path}"
    names = _lines(path, what)
    if not 1 <= len(names) <= MAX_CLASSES:
        raise ModelError(what, got=f"{len(names)} names", expected=f"1 to {MAX_CLASSES}, one a line")
    for number, name in enumerate(names, start=1):
        if not name.strip() or len(name) > MAX_NAME_LENGTH or any(unicodedata.category(c) in _UNPRINTED for c in name):
            raise ModelError(
                what,
                got=f"{name[:40]!r} in line {number}",
                expected=f"a name of 1 to {MAX_NAME_LENGTH} characters, none of them a control character",
            )
    return names


def _lines(path: Path, what: str) -> tuple[str, ...]:
    """The lines of a UTF-8 text file without the blanks around them, and without blank lines at its end."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(what, got=error.strerror, expected="a file that can be read") from error
    if len(content) > MAX_TEXT_BYTES:
        raise ModelError(what, got=f"more than {MAX_TEXT_BYTES} bytes", expected="a list, one entry a line")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(what, got=str(error)[:200], expected="UTF-8 text") from error
    # Not splitlines(): a control character in a line is to be refused, not to end it.
    lines = text.rstrip(_BLANKS + "\n").split("\n")
    return tuple(line.strip(_BLANKS) for line in lines) if lines != [""] else ()


def _require(path: Path, what: str) -> None:
    if not path.is_file():
        raise ConfigError(what, got="no such file", do="check the path")


def _locate(source: str) -> Path | None:
    """The file or folder that a source names; None for the built-in digits."""
    path = Path(source).expanduser()
    if source == "digits" and not path.exists():
        return None
    if path.is_dir():
        return path
    if path.suffix in {".npz", ".npy"}:
        _require(path, f"data file {source}")
        return path
    folder = os.environ.get(ENVIRONMENT)
    if folder:
        candidate = Path(folder).expanduser() / f"{source}.npz"
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"data set {source!r}",
        got=f"no such name, file or folder{f' (also looked in {folder})' if folder else ''}",
        expected="digits, a name in the folder that EDGEGUARD_DATA names, an npz file, or a folder of images",
        do=None if folder else f"set {ENVIRONMENT} to the folder that holds {source}.npz",
    )


def _read(source: str) -> Dataset | _Whole:
    path = _locate(source)
    if path is None:
        return _digits()
    return _folder(path) if path.is_dir() else _npz(path)


def hold_out(data: Dataset, count: int, *, seed: int = 0) -> tuple[Dataset, Array, Labels]:
    """Take about ``count`` inputs off the training set, in each class by its share.

    Sorted training data is cut at the end of each class, so that a run of near-identical inputs stays on one side.

    Returns:
        The data set without them, their inputs, their labels (in random order).

    Raises:
        ConfigError: the training set is too small to give them away.
    """
    total = len(data.x_train)
    if count * 2 > total:
        raise ConfigError(
            f"data set {data.name}",
            got=f"{total} training inputs",
            expected=f"at least {2 * count} to hold out {count}",
        )
    rng = np.random.default_rng(seed)
    is_sorted = bool(np.all(np.diff(data.y_train) >= 0))
    taken: list[npt.NDArray[np.intp]] = []
    for label in np.unique(data.y_train):
        members = np.flatnonzero(data.y_train == label)
        if not is_sorted:
            members = rng.permutation(members)
        taken.append(members[len(members) - max(1, round(len(members) * count / total)) :])
    held = rng.permutation(np.concatenate(taken))
    kept = np.setdiff1d(np.arange(total), held)
    rest = replace(data, x_train=data.x_train[kept], y_train=data.y_train[kept])
    return rest, data.x_train[held], data.y_train[held]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)[..., np.newaxis]
    labels = bunch.target.astype(np.int64)
    # The split of a built-in set is fixed, so that test data stays test data.
    return _split(_Whole("digits", images, labels, tuple(str(c) for c in range(10))), seed=0)


def _npz(path: Path) -> Dataset | _Whole:
    what, name, arrays = f"data file {path}", path.stem, _arrays(path)
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        x_train, y_train = _checked(what, arrays["x_train"], arrays["y_train"])
        x_test, y_test = _checked(what, arrays["x_test"], arrays["y_test"])
        if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
            raise ModelError(
                what,
                got=f"x_train {x_train.dtype}{list(x_train.shape[1:])}, x_test {x_test.dtype}{list(x_test.shape[1:])}",
                expected="one shape and type",
            )
        count = int(max(y_train.max(), y_test.max())) + 1
        return Dataset(
            name=name,
            x_train=x_train,
            y_train=y_train,
            x_test=x_test,
            y_test=y_test,
            classes=tuple(str(c) for c in range(count)),
        )
    if {"x", "y"} <= arrays.keys():
        x, y = _checked(what, arrays["x"], arrays["y"])
        return _Whole(name, x, y, tuple(str(c) for c in range(int(y.max()) + 1)))
    raise ModelError(what, got=f"arrays {_names(arrays)}", expected="x_train, y_train, x_test, y_test or x, y")


def _arrays(path: Path) -> dict[str, Array]:
    """The arrays of a data file by name; the one of a ``.npy`` file is x."""
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return {"x": _npy.read_array(file, allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files if key in _ARRAYS}
    except Exception as error:  # a hostile file makes zipfile, zlib and NumPy raise whatever they like
        raise ModelError(
            f"data file {path}",
            got=str(error)[:200] or type(error).__name__,
            expected="an npy file of a plain array" if path.suffix == ".npy" else "an npz archive of plain arrays",
        ) from error


def _names(arrays: dict[str, Array]) -> str:
    return ", ".join(sorted(arrays)) or "none"


def _checked(what: str, x: Array, y: Array) -> tuple[Array, Labels]:
    inputs = _inputs(what, x)
    return inputs, _labels(what, y, len(inputs))


def _inputs(what: str, x: Array) -> Array:
    if x.ndim < 2 or 0 in x.shape:
        raise ModelError(what, got=f"inputs of shape {list(x.shape)}", expected="[N, ...], N > 0")
    if x.dtype == np.uint8:
        return x[..., np.newaxis] if x.ndim == 3 else x
    if x.dtype.kind not in "fiu":
        raise ModelError(what, got=f"inputs of type {x.dtype}", expected="uint8 images or numbers")
    with np.errstate(over="ignore"):
        inputs = x.astype(np.float32)
    if not np.isfinite(inputs).all():
        raise ModelError(what, got="inputs that are NaN, infinite or beyond float32", expected="finite numbers")
    return inputs


def _labels(what: str, y: Array, count: int) -> Labels:
    if y.shape != (count,):
        raise ModelError(what, got=f"labels of shape {list(y.shape)}", expected=f"one label per input, [{count}]")
    if y.dtype.kind not in "iu":
        raise ModelError(what, got=f"labels of type {y.dtype}", expected="class indices, integers from 0")
    low, high = int(y.min(initial=0)), int(y.max(initial=0))
    if low < 0 or high >= MAX_CLASSES:
        raise ModelError(
            what, got=f"labels from {low} to {high}", expected=f"class indices from 0, at most {MAX_CLASSES} classes"
        )
    return y.astype(np.int64)


def _split(whole: _Whole, seed: int) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(whole.x))
    test = round(len(whole.x) * TEST_SHARE)
    if test < 1 or len(whole.x) - test < 1:
        raise ModelError(f"data set {whole.name}", got=f"{len(whole.x)} inputs", expected="at least 4")
    first, rest = order[:test], order[test:]
    return Dataset(
        name=whole.name,
        x_train=whole.x[rest],
        y_train=whole.y[rest],
        x_test=whole.x[first],
        y_test=whole.y[first],
        classes=whole.classes,
    )


def _folder(path: Path) -> _Whole:
    classes = _subfolders(path)
    if len(classes) < 2:
        raise ModelError(
            f"image folder {path}",
            got=f"{len(classes)} subfolders",
            expected="one subfolder of images per class",
        )
    files = [_image_files(path / name) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(members) for members in files])
    return _Whole(path.name, _images(path, [file for members in files for file in members]), labels, classes)


def _calibration_folder(path: Path) -> tuple[Array, Labels | None, tuple[str, ...]]:
    loose, classes = _image_files(path), _subfolders(path)
    if not classes:
        return _images(path, loose), None, ()
    if loose:
        raise ModelError(
            f"image folder {path}",
            got=f"{len(loose)} images beside {len(classes)} subfolders",
            expected="either images or one subfolder of images per class",
            do="move the one or the other away",
        )
    found = _folder(path)
    return found.x, found.y, found.classes


def _subfolders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")))


def _image_files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir())


def _images(folder: Path, files: Sequence[Path]) -> Array:
    """Decode files to ``uint8 [N, H, W, C]``; all must be of one size."""
    if not files:
        raise ModelError(f"image folder {folder}", got="no images", expected=", ".join(sorted(IMAGE_SUFFIXES)))
    images: list[npt.NDArray[np.uint8]] = []
    for file in files:
        pixels = _pixels(file)
        if images and pixels.shape != images[0].shape:
            raise ModelError(
                f"image {file}",
                got=f"{pixels.shape[1]}x{pixels.shape[0]} with {pixels.shape[2]} channels",
                expected=f"{images[0].shape[1]}x{images[0].shape[0]} with {images[0].shape[2]}, as the first one",
                do="bring all images to one size",
            )
        images.append(pixels)
    return np.stack(images)


def _pixels(file: Path) -> npt.NDArray[np.uint8]:
    """One image ``[H, W, C]``, grey or colour."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
                pixels = (np.asarray(image) >> 8).astype(np.uint8)
            else:
                mode = "L" if image.mode in {"1", "L", "LA"} else "RGB"
                pixels = np.asarray(image.convert(mode), dtype=np.uint8)
    except Exception as error:  # a hostile image makes the decoders raise whatever they like
        raise ModelError(f"image {file}", got=str(error)[:200], do="remove or replace it") from error
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
