"""One loader for every data set: ``digits``, ``<name>.npz`` in ``EDGEGUARD_DATA``, an npz file, an image folder.

Rules enforced here:

* images come out as ``uint8 [N, H, W, C]`` with values 0 to 255, other arrays as float32; labels as ``int64 [N]``;
* a data file is hostile: no pickled objects, shapes and types checked, every array finite;
* held-out data never shares a source with training data: data that stands sorted by class (video tracks of one object,
  as in GTSRB) is split in whole runs, not image by image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgeguard.errors import ConfigError, ModelError

Array = npt.NDArray[np.generic]
Labels = npt.NDArray[np.int64]

ENVIRONMENT = "EDGEGUARD_DATA"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
TEST_SHARE = 0.25
MAX_CLASSES = 4096
_ARRAYS = frozenset({"x_train", "y_train", "x_test", "y_test", "x", "y"})


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


def _read(source: str) -> Dataset | _Whole:
    path = Path(source).expanduser()
    if source == "digits" and not path.exists():
        return _digits()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz":
        if not path.is_file():
            raise ConfigError(f"data file {source}", got="no such file", do="check the path")
        return _npz(path, path.stem)
    folder = os.environ.get(ENVIRONMENT)
    if folder:
        candidate = Path(folder).expanduser() / f"{source}.npz"
        if candidate.is_file():
            return _npz(candidate, source)
    raise ConfigError(
        f"data set {source!r}",
        got=f"no such name, file or folder{f' (also looked in {folder})' if folder else ''}",
        expected="digits, a name in the folder that EDGEGUARD_DATA names, an npz file, or a folder of images",
        do=None if folder else f"set {ENVIRONMENT} to the folder that holds {source}.npz",
    )


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


def _npz(path: Path, name: str) -> Dataset | _Whole:
    arrays = _read_npz(path)
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        x_train, y_train = _checked(path, arrays["x_train"], arrays["y_train"])
        x_test, y_test = _checked(path, arrays["x_test"], arrays["y_test"])
        if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
            raise ModelError(
                f"data file {path}",
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
        x, y = _checked(path, arrays["x"], arrays["y"])
        return _Whole(name, x, y, tuple(str(c) for c in range(int(y.max()) + 1)))
    raise ModelError(
        f"data file {path}",
        got=f"arrays {', '.join(sorted(arrays)) or 'none'}",
        expected="x_train, y_train, x_test, y_test or x, y",
    )


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files if key in _ARRAYS}
    except Exception as error:  # a hostile archive makes zipfile, zlib and NumPy raise whatever they like
        raise ModelError(
            f"data file {path}",
            got=str(error) or type(error).__name__,
            expected="an npz archive of plain arrays",
        ) from error


def _checked(path: Path, x: Array, y: Array) -> tuple[Array, Labels]:
    if x.ndim < 2 or len(x) == 0 or 0 in x.shape:
        raise ModelError(f"data file {path}", got=f"inputs of shape {list(x.shape)}", expected="[N, ...], N > 0")
    if y.shape != (len(x),):
        raise ModelError(
            f"data file {path}",
            got=f"labels of shape {list(y.shape)}",
            expected=f"one label per input, [{len(x)}]",
        )
    if not np.issubdtype(y.dtype, np.integer) or int(y.min()) < 0:
        raise ModelError(f"data file {path}", got=f"labels of type {y.dtype}", expected="class indices from 0")
    if int(y.max()) >= MAX_CLASSES:
        raise ModelError(f"data file {path}", got=f"a label {int(y.max())}", expected=f"at most {MAX_CLASSES} classes")
    if x.dtype == np.uint8:
        inputs: Array = x[..., np.newaxis] if x.ndim == 3 else x
    elif np.issubdtype(x.dtype, np.floating) or np.issubdtype(x.dtype, np.integer):
        inputs = x.astype(np.float32)
        if not np.isfinite(inputs).all():
            raise ModelError(f"data file {path}", got="inputs that are NaN or infinite", expected="finite numbers")
    else:
        raise ModelError(f"data file {path}", got=f"inputs of type {x.dtype}", expected="uint8 images or numbers")
    return inputs, y.astype(np.int64)


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
    from PIL import Image

    classes = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if len(classes) < 2:
        raise ModelError(
            f"image folder {path}",
            got=f"{len(classes)} subfolders",
            expected="one subfolder of images per class",
        )
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        for file in sorted((path / name).iterdir()):
            if file.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            try:
                with Image.open(file) as image:
                    mode = "L" if image.mode in {"1", "L", "I", "I;16", "LA"} else "RGB"
                    pixels = np.asarray(image.convert(mode), dtype=np.uint8)
            except Exception as error:  # a hostile image makes the decoders raise whatever they like
                raise ModelError(f"image {file}", got=str(error)[:200], do="remove or replace it") from error
            pixels = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
            if images and pixels.shape != images[0].shape:
                raise ModelError(
                    f"image {file}",
                    got=f"{pixels.shape[1]}x{pixels.shape[0]} with {pixels.shape[2]} channels",
                    expected=f"{images[0].shape[1]}x{images[0].shape[0]} with {images[0].shape[2]}, as the first one",
                    do="bring all images to one size",
                )
            images.append(pixels)
            labels.append(label)
    if not images:
        raise ModelError(f"image folder {path}", got="no images", expected=", ".join(sorted(IMAGE_SUFFIXES)))
    return _Whole(path.name, np.stack(images), np.asarray(labels, dtype=np.int64), tuple(classes))
