"""``edgeguard hub`` on cases of private models: the question to the fleet, and what three parties found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edgeguard.contract.private import Finding, Inspection, Round
from edgeguard.errors import EXIT_CLEAN, EXIT_USAGE
from edgeguard.hub.config import PrivateConfig
from edgeguard.hub.private import Private
from edgeguard.private import parties
from edgeguard.private.parties import Own
from tests.cli.conftest import Run
from tests.hub.serving import Served, serve
from tests.simulators import fleet
from tests.simulators import private as making


@pytest.fixture(scope="module")
def owns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Own, ...]:
    return making.parties(tmp_path_factory.mktemp("parties"))


@pytest.fixture
def hub(tmp_path: Path, owns: tuple[Own, ...], monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A hub with a private model of four classes, that every command asks as an operator."""
    config = PrivateConfig(parties=owns[0].folder / parties.TOGETHER)
    known = Private(fleet="test", parties=owns[0].parties, config=config)
    with serve(tmp_path, guard=fleet.guard_metadata(classes=4), private=known) as served:
        monkeypatch.setenv("EDGEGUARD_URL", f"http://127.0.0.1:{served.web.port}")
        monkeypatch.setenv("EDGEGUARD_TOKEN", served.secrets["operator"])
        served.add_case(private=True, awaiting="inspect")
        yield served


@pytest.fixture
def files(owns: tuple[Own, ...], tmp_path: Path) -> Path:
    """A folder with a plan, and what north and south signed: label 1 is flagged."""
    plan = Inspection(id="case-0001-plan", parties=owns[0].parties.digest, model_digest=fleet.MODEL, layers=(64, 8, 4))
    finding = Finding(inspection=plan.digest, given="one other", verdict="backdoored", labels=(1,))
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(plan))
    for name, own in zip(("north", "south"), owns, strict=False):
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(parties.sign(own, finding)))
    return tmp_path


def words(folder: Path, *names: str) -> list[object]:
    brought = [word for name in names for word in ("--result", folder / f"{name}.json")]
    return ["hub", "private", 1, "--plan", folder / "plan.json", *brought]


def test_what_two_parties_signed_confirms_the_case(edgeguard: Run, hub: Served, files: Path) -> None:
    code, out, _ = edgeguard(*words(files, "north", "south"), "--why", "by Ada")
    assert (code, out) == (EXIT_CLEAN, "case 1 is confirmed: label 1 stands out, as north and south signed\n")
    told = edgeguard("hub", "case", 1)[1]
    assert "by Ada" in told
    assert "edgeguard release add" in told


def test_a_case_says_that_it_waits_for_a_private_inspection_and_for_no_approval(edgeguard: Run, hub: Served) -> None:
    assert "waits for a private inspection" in edgeguard("hub", "case", 1)[1]
    assert "a private inspection" in edgeguard("hub", "cases")[1]
    out = edgeguard("hub", "proposed")[1]
    assert "edgeguard hub case 1" in out
    assert "approve 1" not in out
    assert edgeguard("hub", "approve", 1, "inspect")[0] == EXIT_USAGE


def test_a_round_is_written_as_devices_and_parties_read_it(edgeguard: Run, hub: Served, tmp_path: Path) -> None:
    code, out, _ = edgeguard("hub", "case", 1, "--round", tmp_path / "round.json")
    assert (code, str(tmp_path / "round.json") in out) == (EXIT_CLEAN, True)
    asked = parties.read_json(tmp_path / "round.json", Round)
    assert (asked.fleet, asked.model_digest, asked.layer) == ("test", fleet.MODEL, "relu2")


@pytest.mark.parametrize(
    ("broken", "content", "word"),
    [
        ("plan", None, "check the path"),
        ("plan", b"", "inspection"),
        ("plan", b"[]", "inspection"),
        ("plan", b"\xff", "inspection"),
        ("plan", b"[" * 60_000, "inspection"),
        ("plan", b" " * 100_000, "inspection"),
        ("north", None, "check the path"),
        ("north", b"{}", "signed"),
        ("north", json.dumps({"verdict": "no_sign"}).encode(), "signed"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(
    edgeguard: Run, hub: Served, files: Path, broken: str, content: bytes | None, word: str
) -> None:
    path = files / f"{broken}.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    code, out, err = edgeguard(*words(files, "north", "south"))
    assert (code, out, err.count("\n"), word in err) == (EXIT_USAGE, "", 1, True)
    assert [case.state for case in hub.book.all()] == ["suspected"]


@pytest.mark.parametrize(("names", "word"), [(("north",), "at least 2"), (("north", "north"), "at least 2")])
def test_one_party_is_not_believed(edgeguard: Run, hub: Served, files: Path, names: tuple[str, ...], word: str) -> None:
    code, out, err = edgeguard(*words(files, *names))
    assert (code, out, err.count("\n"), word in err) == (EXIT_USAGE, "", 1, True)
    assert [case.state for case in hub.book.all()] == ["suspected"]


@pytest.mark.parametrize("command", ["hub private", "private inspect sign"])
def test_each_command_explains_itself_with_an_example(edgeguard: Run, command: str) -> None:
    code, out, _ = edgeguard(*command.split(), "--help")
    assert (code, f"edgeguard {command}" in " ".join(out.split("Example")[-1].split())) == (EXIT_CLEAN, True)
