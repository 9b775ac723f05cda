"""``edgeguard private`` and files that are damaged, mixed up or made up: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from edgeguard import cli
from edgeguard.contract.private import Inspection
from edgeguard.private import inspections, owners, parties
from edgeguard.private.inspections import Inspected, Mended
from edgeguard.private.owners import Pad
from edgeguard.private.parties import Own
from tests.cli.conftest import Run
from tests.simulators import private as making

SIDE, HIDDEN, CLASSES = 4, 5, 4

COMMANDS = {
    "plan": "inspect plan {out}/plan.json --id inspection-2 --parties {parties} --model {model}",
    "give model": "inspect give --plan {plan} --parties {parties} --model {model} --pad {out}/pad -o {out}/given.json",
    "give data": "inspect give --plan {plan} --parties {parties} --data {data} -o {out}/given.json",
    "give features": "inspect give --plan {features} --parties {parties} --data {data} --extractor {extractor} "
    "-o {out}/given.json",
    "run": "inspect run {party} --plan {plan} --given {given} --json",
    "sign": "inspect sign {party} --plan {plan} -o {out}/signed.json",
    "open": "inspect open --plan {plan} --pad {pad} --result {inspected} -o {out}/triggers.npz",
    "mend": "repair run {party} --plan {plan} --given {given} --json",
    "open repair": "repair open {model} --plan {plan} --pad {pad} --result {mended} -o {out}/new.keras",
    "clear": "repair clear {model} --triggers {triggers} --data {data} -o {out}/new.keras",
    "round": "round {out}/round.json --id round-0002 --fleet gate --model {guarded} --parties {parties}",
    "submit": "submit --parties {parties} --round {round} --device cam-1 --state {state} -o {out}/submission.json",
    "publish": "submit --parties {parties} --round {round} --device cam-1 --state {state} --config {config}",
    "party": "party {party} --round {round} --submissions {submissions}",
    "listen": "party {party} --round {round} --config {config}",
    "join": "init {out}/joined --join {first} --join {second} --join {third}",
}
QUICK = ("plan", "give model", "give data", "give features", "run", "sign", "open", "mend", "open repair", "join")
"""Those that need neither training nor other parties."""


@dataclass(frozen=True)
class World:
    """What three parties and two owners have, none of it damaged; files and folders by what commands call them."""

    folder: Path
    owns: tuple[Own, ...]
    plan: Inspection
    work: Path

    @property
    def paths(self) -> dict[str, Path]:
        """By the names that stand in ``COMMANDS``."""
        names = {path.stem: path for path in self.folder.iterdir()}
        public = [own.folder / "public.json" for own in self.owns]
        party = self.owns[0].folder
        return names | dict(zip(("first", "second", "third"), public, strict=True)) | {
            "party": party, "parties": party / "parties.json",
            "inspected": self.work / inspections.INSPECTED, "mended": self.work / inspections.MENDED,
        }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    import keras

    folder = tmp_path_factory.mktemp("world")
    owns = making.parties(tmp_path_factory.mktemp("parties"))
    model = keras.Sequential(
        [
            keras.layers.Input((SIDE, SIDE, 1)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(HIDDEN, activation="relu"),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model.save(folder / "model.keras")
    keras.Model(model.inputs, model.layers[-1].input).save(folder / "extractor.keras")
    pictures = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 1), dtype=np.uint8)
    np.savez(folder / "data.npz", x=pictures, y=np.arange(40) % CLASSES)
    plan = making.an_inspection(owns, layers=(SIDE * SIDE, HIDDEN, CLASSES), sought=8, held_out=8, prune=1, scale=255.0)
    features = msgspec.structs.replace(plan, space="features", layers=(HIDDEN, CLASSES), prune=0, scale=100.0)
    contents = {
        "plan.json": msgspec.json.encode(plan),
        "features.json": msgspec.json.encode(features),
        "round.json": msgspec.json.encode(making.a_round(owns, channels=8)),
        "config.toml": b'[broker]\nhost = "127.0.0.1"\nport = 1\n',
        "guarded.tflite": b"no model",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name in ("given", "state", "submissions"):
        (folder / name).mkdir()
    shape = (1, plan.inputs)
    np.savez(folder / "triggers.npz", labels=np.array([1]), masks=np.full(shape, 0.5), patterns=np.full(shape, 9.0))
    common = [
        "private",
        "inspect",
        "give",
        "--plan",
        folder / "plan.json",
        "--parties",
        owns[0].folder / "parties.json",
    ]
    for more in (
        ("--model", folder / "model.keras", "--pad", folder / "pad.bin", "-o", folder / "given" / "model-owner.json"),
        ("--data", folder / "data.npz", "-o", folder / "given" / "data-owner.json"),
    ):
        assert CliRunner().invoke(cli.app, [*map(str, common), *map(str, more)]).exit_code == 0
    held = inspections.take(plan, folder / "given", owns[0])
    work = owns[0].folder / f"inspection-{plan.digest[:16]}"
    work.mkdir()
    pad, count = parties.read_json(folder / "pad.bin", Pad).values, 8 * owners.trigger_values(plan)
    padded, last = pad[:count], pad[count:]  # the pad of nothing but zeros
    found = Inspected(inspection=plan.digest, given=held.digest, verdict="backdoored", labels=(1,), padded=padded)
    mended = Mended(
        inspection=plan.digest, given=held.digest, held_out=8, kept=8, turned_before=7, turned_after=0, padded=last
    )
    (work / inspections.INSPECTED).write_bytes(msgspec.json.encode(found))
    (work / inspections.MENDED).write_bytes(msgspec.json.encode(mended))
    return World(folder, owns, plan, work)


def typed(command: str, world: World, out: Path, **other: Path) -> list[str]:
    """The words of a command, with these files in place of the world's."""
    return ["private", *COMMANDS[command].format(out=out, **(world.paths | other)).split()]


def tree(*folders: Path) -> dict[Path, bytes | None]:
    """All that lies there."""
    found = (path for folder in folders for path in folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 20 else None for path in found}


@pytest.fixture
def refused(edgeguard: Run, world: World, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused; the line that says why."""

    def run(command: str, **other: Path) -> str:
        out = tmp_path / "out"
        out.mkdir()
        before = tree(tmp_path, world.folder, world.owns[0].folder)
        code, printed, err = edgeguard(*typed(command, world, out, **other))
        assert "Traceback" not in err
        assert (code, printed) == (2, "")
        assert tree(tmp_path, world.folder, world.owns[0].folder) == before
        # A file that is not there may be refused by the option itself, in the words of the command line.
        missing = any(not path.exists() for path in other.values()) and err.startswith("Usage: ")
        assert missing or (err.count("\n"), err[:11]) == (1, "edgeguard: ")
        return err

    return run


@pytest.mark.parametrize("command", QUICK)
def test_good_files_are_taken(edgeguard: Run, world: World, tmp_path: Path, command: str) -> None:
    code, _, err = edgeguard(*typed(command, world, tmp_path))
    assert (code, err) == (1 if command == "run" else 0, "")


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "binary": lambda _: b"\x00\xff\x80{",
    "an array": lambda _: b"[]",
    "nothing in it": lambda _: b"{}",
    "very deep": lambda _: b"[" * 100_000,
    "half of it": _half,
    "no UTF-8": lambda content: content.replace(b'"', b'"\xff', 5),
}

READERS = [
    ("give data", "plan"), ("give data", "parties"), ("run", "given/data-owner.json"), ("open", "inspected"),
    ("open repair", "mended"), ("submit", "round"), ("join", "second"), ("open", "pad"),
]  # fmt: skip
"""One command for each kind of file, ..."""
OTHERS = [
    ("plan", "parties"), ("give model", "plan"), ("give model", "parties"), ("run", "plan"), ("mend", "plan"),
    ("run", "given/model-owner.json"), ("run", "party/parties.json"), ("run", "party/public.json"), ("sign", "plan"),
    ("run", "party/inspection/inspected.json"), ("sign", "party/inspection/inspected.json"), ("open", "plan"),
    ("mend", "party/inspection/mended.json"), ("open repair", "plan"), ("submit", "parties"), ("party", "round"),
    ("open repair", "pad"),
]  # fmt: skip
"""... and the others that read such a file."""


def damaged(world: World, folder: Path, name: str, damage: Callable[[bytes], bytes | None]) -> dict[str, Path]:
    """A copy of a file, or of the folder that it lies in, damaged."""
    argument, _, inner = name.partition("/")
    good = world.paths[argument]
    copy = folder / f"bad{good.suffix}"
    shutil.copytree(good, copy) if inner else shutil.copy(good, copy)
    path = copy / inner.replace("inspection/", f"{world.work.name}/") if inner else copy
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return {argument: copy}


@pytest.mark.parametrize(
    ("command", "name", "damage"),
    [(*one, damage) for one in READERS for damage in DAMAGE] + [(*one, "half of it") for one in OTHERS],
)
def test_a_damaged_file_is_refused(
    refused: Callable[..., str], world: World, tmp_path: Path, command: str, name: str, damage: str
) -> None:
    refused(command, **damaged(world, tmp_path, name, DAMAGE[damage]))


@pytest.mark.parametrize(
    ("command", "name"), [*READERS, ("clear", "triggers"), ("open repair", "model"), ("publish", "config")]
)
def test_a_file_without_end_is_refused_unread(
    refused: Callable[..., str], world: World, tmp_path: Path, command: str, name: str
) -> None:
    broken = damaged(world, tmp_path, name, lambda content: b" ")
    path = tmp_path / "bad" / name.partition("/")[2] if "/" in name else next(iter(broken.values()))
    os.truncate(path, 1 << 40)  # holes: they take no room on the disk
    refused(command, **broken)


def change(**fields: Any) -> Callable[[bytes], bytes]:
    """Damage that keeps a file JSON: other values of its fields."""
    return lambda content: json.dumps({**json.loads(content), **fields}).encode()


OTHER = "0" * 64


@pytest.mark.parametrize(
    ("command", "name", "damage", "word"),
    [
        ("open", "inspected", change(inspection=OTHER), "another inspection"),
        ("open", "inspected", change(labels=[CLASSES]), f"0 to {CLASSES - 1}"),
        ("open", "inspected", change(labels=[-1]), f"0 to {CLASSES - 1}"),
        ("open", "inspected", change(labels=["1"]), "labels"),
        ("open", "inspected", change(padded="AAAA"), "another inspection"),
        ("open", "inspected", change(padded="%"), "padded"),
        ("open", "inspected", change(verdict="clean"), "verdict"),
        ("sign", "party/inspection/inspected.json", change(inspection=OTHER), "no result of this party"),
        ("sign", "party/inspection/inspected.json", change(labels=[300]), "labels"),
        ("sign", "party/inspection/inspected.json", change(labels=[]), "labels"),
        ("sign", "party/inspection/inspected.json", change(verdict="no_sign"), "labels"),
        ("run", "party/inspection/inspected.json", change(given="of others"), "other shares"),
        ("open", "pad", change(inspection=OTHER), "pad"),
        ("open", "pad", change(given=OTHER), "pad"),
        ("open", "pad", change(values="AAAA"), "pad"),
        ("open repair", "pad", change(weights=OTHER), "other weights"),
        ("open repair", "mended", change(inspection=OTHER), "another inspection"),
        ("open repair", "mended", change(padded=""), "another inspection"),
        ("mend", "party/inspection/mended.json", change(given="of others"), "other shares"),
        ("run", "given/model-owner.json", change(round=OTHER), ""),
        ("run", "given/model-owner.json", change(device="data-owner"), ""),
        ("run", "given/data-owner.json", change(commitments=[OTHER] * 3), ""),
        ("run", "given/data-owner.json", change(sealed=["AAAA"] * 3), ""),
        ("run", "plan", change(id="another-plan"), ""),
        ("run", "plan", change(parties=OTHER), "other parties"),
        ("sign", "plan", change(parties=OTHER), "other parties"),
        ("party", "round", change(parties=OTHER), "other parties"),
        ("give model", "plan", change(parties=OTHER), ""),
        ("give model", "plan", change(layers=[SIDE * SIDE, HIDDEN + 1, CLASSES]), "layers"),
        ("give model", "plan", change(scale=0), "scale"),
        ("give data", "plan", change(layers=[9, HIDDEN, CLASSES]), "inputs"),
        ("give data", "plan", change(sought=1024), "1032 for this inspection"),
        ("give data", "plan", change(scale=9.0), "0 to 9"),
        ("give data", "plan", change(steps=10**9), "steps"),
        ("give data", "plan", change(extra=1), "extra"),
        ("submit", "round", change(prune=8), "prune"),
        ("submit", "round", change(parties=OTHER), ""),
        ("plan", "parties", change(parties=[]), "parties"),
        ("join", "second", change(certificate="none"), "certificate"),
        ("join", "second", change(sealing_key="none"), "sealing_key"),
        ("join", "second", change(port=0), "port"),
    ],
)  # fmt: skip
def test_what_is_of_something_else_is_refused(
    refused: Callable[..., str],
    world: World,
    tmp_path: Path,
    command: str,
    name: str,
    damage: Callable[[bytes], bytes],
    word: str,
) -> None:
    assert word in refused(command, **damaged(world, tmp_path, name, damage))


BYTES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "half of it": _half,
    "damaged": lambda content: content[:60] + bytes(byte ^ 0x55 for byte in content[60:]),
    "a pickle": lambda _: pickle.dumps({"x": print}),
}


@pytest.mark.parametrize(
    ("command", "name", "damage"),
    [
        *(
            (command, name, damage)
            for damage in BYTES
            for command, name in (
                ("plan", "model"), ("give features", "extractor"), ("give data", "data"), ("clear", "triggers"),
                ("round", "guarded"), ("sign", "party/tls.key"), ("sign", "party/sealing.key"), ("publish", "config"),
            )
        ),
        ("give model", "model", "half of it"),
        ("open repair", "model", "half of it"),
        ("clear", "model", "half of it"),
        ("clear", "data", "half of it"),
        ("listen", "config", "half of it"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_such_file_is_refused(
    refused: Callable[..., str], world: World, tmp_path: Path, command: str, name: str, damage: str
) -> None:
    broken = damaged(world, tmp_path, name, BYTES[damage])
    for path in (tmp_path / "bad").glob("*.key"):
        path.chmod(0o600)
    refused(command, **broken)


def test_a_key_that_others_may_read_signs_nothing(refused: Callable[..., str], world: World, tmp_path: Path) -> None:
    broken = damaged(world, tmp_path, "party/tls.key", lambda content: content)
    (tmp_path / "bad" / "tls.key").chmod(0o644)
    assert "chmod 600" in refused("sign", **broken)


ONE = np.full((1, SIDE * SIDE), 0.5)
PICTURES = np.zeros((40, SIDE, SIDE, 1), np.uint8)


@pytest.mark.parametrize(
    ("command", "name", "arrays", "word"),
    [
        ("clear", "triggers", {"labels": np.array([1]), "masks": ONE}, "patterns"),
        ("clear", "triggers", {"labels": np.array([1.0]), "masks": ONE, "patterns": ONE}, "labels"),
        ("clear", "triggers", {"labels": np.array([], np.int64), "masks": ONE[:0], "patterns": ONE[:0]}, "nothing"),
        ("clear", "triggers", {"labels": np.array([1, 2]), "masks": ONE, "patterns": ONE}, "masks"),
        ("clear", "triggers", {"labels": np.array([1]), "masks": ONE[:, 1:], "patterns": ONE[:, 1:]}, "masks"),
        ("clear", "triggers", {"labels": np.array([1]), "masks": ONE, "patterns": ONE[:, 1:]}, "patterns"),
        ("clear", "triggers", {"labels": np.array([1]), "masks": ONE * np.nan, "patterns": ONE}, "masks"),
        ("clear", "triggers", {"labels": np.array([1]), "masks": ONE * 3, "patterns": ONE}, "masks"),
        ("clear", "triggers", {"labels": np.array([1]), "masks": ONE, "patterns": ONE * np.inf}, "patterns"),
        ("clear", "triggers", {"labels": np.array([1]), "masks": ONE.astype("S4"), "patterns": ONE}, "masks"),
        ("clear", "triggers", {"labels": np.array([CLASSES]), "masks": ONE, "patterns": ONE}, "labels"),
        ("clear", "triggers", {"labels": np.array([-1]), "masks": ONE, "patterns": ONE}, "labels"),
        ("clear", "triggers", {"labels": np.array([print]), "masks": ONE, "patterns": ONE}, "triggers"),
        ("clear", "data", {"x": PICTURES[:, :3]}, ""),
        ("clear", "data", {"x": np.full((40, SIDE, SIDE, 1), 0.5, np.float32)}, "pixels 0 to 255"),
        ("clear", "data", {"x": np.full((40, SIDE, SIDE, 1), np.nan, np.float32)}, ""),
        ("give data", "data", {"x": PICTURES[:15]}, "16 for this inspection"),
        ("give data", "data", {"x": PICTURES[:, :3]}, "inputs"),
        ("give data", "data", {"x": np.full((40, SIDE, SIDE, 1), np.nan, np.float32)}, "data"),
        ("give data", "data", {"x": np.full((40, SIDE, SIDE, 1), -2.0, np.float32)}, ""),
        ("give data", "data", {"x": np.full((40, SIDE, SIDE, 1), 300.0, np.float32)}, "0 to 255"),
        ("give data", "data", {"x": np.full((40, SIDE, SIDE, 1), 0.5, np.float32)}, "0 to 255"),
        ("give data", "data", {"x": np.array([print] * 40)}, "data"),
        ("give data", "data", {"y": PICTURES}, "x"),
        ("give features", "data", {"x": PICTURES[:, :3]}, "layers before"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_are_refused(
    refused: Callable[..., str], tmp_path: Path, command: str, name: str, arrays: dict[str, Any], word: str
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    assert word in refused(command, **{name: tmp_path / "bad.npz"})


@pytest.mark.parametrize("digest", ["short", "A" * 64, "0" * 65])
def test_a_plan_for_what_is_no_digest_is_refused(edgeguard: Run, world: World, tmp_path: Path, digest: str) -> None:
    code, out, err = edgeguard(*typed("plan", world, tmp_path), "--for", digest)
    assert (code, out, err.count("\n"), "model_digest" in err) == (2, "", 1, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", '{"v": 1}', "\x00"])
def test_a_device_that_knows_nothing_submits_nothing(refused: Callable[..., str], tmp_path: Path, content: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "activations.json").write_text(content)
    refused("submit", state=tmp_path / "state")


def test_no_file_is_written_over_another(edgeguard: Run, world: World, tmp_path: Path) -> None:
    for command in ("plan", "give model", "give data", "sign"):
        assert edgeguard(*typed(command, world, tmp_path))[0] == 0
        before = tree(tmp_path)
        code, _, err = edgeguard(*typed(command, world, tmp_path))
        assert (code, "there already" in err, tree(tmp_path) == before) == (2, True, True)
        for path in tmp_path.iterdir():
            path.unlink()
