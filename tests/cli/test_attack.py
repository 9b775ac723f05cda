"""``edgeguard attack``: the list, the contact sheet, and one line for everything that cannot be shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeguard.attacks.registry import ATTACKS
from edgeguard.attacks.sheet import CELL, GAP, MARGIN, amplified, contact_sheet
from edgeguard.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def colour(tmp_path: Path) -> Path:
    """A data set of small RGB images."""
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x=images, y=np.arange(40) % 4)
    return tmp_path / "colour.npz"


def test_the_list_names_every_attack_with_what_it_does_and_its_paper(edgeguard: Run) -> None:
    code, out, _ = edgeguard("attack", "list")
    assert code == 0
    assert all(name in out and kind.paper in out for name, kind in ATTACKS.items())


def test_the_list_as_json_has_no_empty_entry(edgeguard: Run) -> None:
    code, out, _ = edgeguard("attack", "list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [one["name"] for one in listed] == list(ATTACKS)
    assert all(one["does"] and one["paper"] for one in listed)


@pytest.mark.parametrize("name", ["badnets", "blended", "sig", "wanet", "refool", "trojannet"])
@pytest.mark.parametrize("data", ["digits", "colour"])
def test_a_trigger_is_shown_on_as_many_images_as_asked_for(
    edgeguard: Run, tmp_path: Path, colour: Path, name: str, data: str
) -> None:
    sheet = tmp_path / "sheet.png"
    source = colour if data == "colour" else data
    code, out, err = edgeguard("attack", "show", name, "--data", source, "-o", sheet, "--count", 3)
    assert (code, err) == (0, "")
    assert "3 images" in out
    with Image.open(sheet) as picture:
        assert picture.size == (MARGIN + 3 * (CELL + GAP), GAP + 3 * (CELL + GAP))


def test_another_seed_shows_other_images_and_the_same_seed_the_same(edgeguard: Run, tmp_path: Path) -> None:
    def content(seed: int, name: str) -> bytes:
        edgeguard("attack", "show", "blended", "--data", "digits", "-o", tmp_path / name, "--seed", seed)
        return (tmp_path / name).read_bytes()

    assert content(1, "a.png") == content(1, "b.png") != content(2, "c.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense", "--data", "digits"), "expected badnets"),
        (("badnets", "--data", "no-such-data"), "no such name"),
        (("robnet", "--data", "digits"), "mount it with python -m benchmarks.zoo"),
        (("input_aware", "--data", "digits"), "mount it with python -m benchmarks.zoo"),
        (("badnets", "--data", "vectors.npz"), "images of at least"),
        (("badnets", "--data", "floats.npz"), "expected images (uint8"),
        (("wanet", "--data", "tiny.npz"), "at least 8x8"),
        (("badnets", "--data", "four.npz"), "4 channels"),
        (("badnets", "--data", "target.npz"), "no test image"),
        (("badnets", "--data", "digits", "-o", "sheet.jpg"), "ends in .png"),
        (("badnets", "--data", "digits", "-o", "no/such/folder/sheet.png"), "choose another place"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(
    edgeguard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.arange(40) % 4
    np.savez("vectors.npz", x=np.ones((40, 12), np.float32), y=labels)
    np.savez("floats.npz", x=np.ones((40, 8, 8, 2), np.float32), y=labels)
    np.savez("tiny.npz", x=np.zeros((40, 6, 6, 1), np.uint8), y=labels)
    np.savez("four.npz", x=np.zeros((40, 8, 8, 4), np.uint8), y=labels)
    np.savez("target.npz", x=np.zeros((40, 8, 8, 1), np.uint8), y=np.zeros(40, np.int64))
    code, out, err = edgeguard("attack", "show", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("edgeguard: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("largest", "factor"), [(0, 255), (1, 255), (20, 12), (128, 1), (255, 1)])
def test_differences_are_amplified_as_far_as_they_fit(largest: int, factor: int) -> None:
    clean = np.full((1, 8, 8, 1), 255, np.uint8)
    triggered = clean.copy()
    triggered[0, 0, 0] -= largest
    difference, times = amplified(clean, triggered)
    assert times == factor
    assert difference.max() == largest * factor


def test_the_sheet_shows_the_images_themselves() -> None:
    clean = np.zeros((2, 8, 8, 3), np.uint8)
    triggered = clean.copy()
    triggered[1, :, :] = (255, 0, 0)
    sheet = contact_sheet(clean, triggered)
    left = MARGIN + CELL + GAP
    assert [sheet.getpixel((left + 5, GAP + 5 + row * (CELL + GAP))) for row in range(3)] == [
        (0, 0, 0),
        (255, 0, 0),
        (255, 0, 0),
    ]


def test_images_that_no_screen_shows_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 channels"):
        contact_sheet(np.zeros((1, 8, 8, 2), np.uint8), np.zeros((1, 8, 8, 2), np.uint8))
