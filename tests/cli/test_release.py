"""``edgeguard release``: what it makes, what it says, what it never says, and how it fails."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from msgspec.structs import replace

from tests.cli.conftest import Run
from tests.simulators import fleet

PASSPHRASE = "a passphrase that is long enough"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in a folder of their own, with the offline keys' passphrase and a private key at hand."""
    monkeypatch.chdir(tmp_path)
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    monkeypatch.setenv("KEY", key.decode())
    monkeypatch.setenv("EDGEGUARD_OFFLINE_PASSPHRASE", PASSPHRASE)
    (tmp_path / "signs.guarded.tflite").write_bytes(fleet.guarded_file(fleet.guard_metadata()))


ALL = ("release", "--keys", "keys", "--offline", "offline")


def init(edgeguard: Run, *more: str) -> str:
    code, out, err = edgeguard("release", "init", *ALL, *more)
    assert (code, err) == (0, "")
    return out


def ask(edgeguard: Run, command: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a command prints."""
    code, out, err = edgeguard("release", command, *arguments, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def fails(edgeguard: Run, *arguments: object) -> str:
    """The one line that a command fails with."""
    code, out, err = edgeguard("release", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_init_says_what_it_made_and_what_to_do_with_it(edgeguard: Run, tmp_path: Path) -> None:
    out = init(edgeguard)
    assert f"Devices trust:  {tmp_path}/release/metadata/1.root.json" in out
    assert f"Take away, and back up twice: {tmp_path}/offline" in out
    offline = list((tmp_path / "offline").iterdir())
    assert sorted(path.name.split("-")[0] for path in offline) == ["root", "targets"]
    assert all(b"ENCRYPTED" in path.read_bytes() for path in offline)
    assert not any(b"ENCRYPTED" in path.read_bytes() for path in (tmp_path / "keys").iterdir())


def test_the_hubs_keys_are_encrypted_where_their_passphrase_is_set(
    edgeguard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEGUARD_HUB_PASSPHRASE", "the hub's own passphrase")
    init(edgeguard)
    assert all(b"ENCRYPTED" in path.read_bytes() for path in (tmp_path / "keys").iterdir())
    assert edgeguard("release", "renew", *ALL)[0] == 0
    monkeypatch.delenv("EDGEGUARD_HUB_PASSPHRASE")
    assert "set EDGEGUARD_HUB_PASSPHRASE" in fails(edgeguard, "renew", *ALL)


def test_init_never_overwrites(edgeguard: Run, tmp_path: Path) -> None:
    init(edgeguard)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "something is there already" in fails(edgeguard, "init", *ALL)
    assert "something is there already" in fails(edgeguard, "init", "new", *ALL[1:])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_without_a_passphrase_or_a_person_to_ask_no_plain_offline_key_is_written(
    edgeguard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEGUARD_OFFLINE_PASSPHRASE")
    assert "give --unencrypted" in fails(edgeguard, "init", *ALL)
    assert not (tmp_path / "offline").exists()
    init(edgeguard, "--unencrypted")
    monkeypatch.setenv("EDGEGUARD_OFFLINE_PASSPHRASE", "short")
    assert "expected at least 12" in fails(edgeguard, "rotate", "release", "root", *ALL[1:])


def test_a_first_release_is_signed_offline_and_listed(edgeguard: Run) -> None:
    init(edgeguard)
    release = ask(edgeguard, "add", "release", "signs.guarded.tflite", "--first", *ALL[1:])
    assert (release["target"], release["replaces"], release["published"]) == ("signs-1.tflite", None, True)
    assert (release["model_digest"], release["guard_digest"]) == (fleet.MODEL, fleet.GUARD)
    assert [one["target"] for one in ask(edgeguard, "status", "release")["listed"]] == ["signs-1.tflite"]


def test_a_release_says_what_it_replaces_and_where_it_runs(edgeguard: Run) -> None:
    init(edgeguard)
    for replaced in ("signs.guarded.tflite", fleet.MODEL):
        release = ask(
            edgeguard, "add", "release", "signs.guarded.tflite", "--replaces", replaced, "--board", "raspberry pi 5*",
            "--runtime", "litert", *ALL[1:],
        )  # fmt: skip
        assert (release["replaces"], release["boards"]) == (fleet.MODEL, ["raspberry pi 5*"])
        assert release["runtimes"] == ["litert"]


def test_a_sidecar_that_the_model_names_is_released_with_it_or_left_out_on_purpose(
    edgeguard: Run, tmp_path: Path
) -> None:
    init(edgeguard)
    content = b"inputs and what the model says of them"
    named = replace(fleet.guard_metadata(), sidecar_digest=sha256(content).hexdigest())
    (tmp_path / "signs.guarded.tflite").write_bytes(fleet.guarded_file(named))
    arguments = ("release", "signs.guarded.tflite", "--first", *ALL[1:])
    line = fails(edgeguard, "add", *arguments)
    assert "signs.guard.npz" in line
    assert "give --no-sidecar" in line
    ask(edgeguard, "add", *arguments, "--no-sidecar")
    assert not list((tmp_path / "release/targets").glob("*.npz"))
    (tmp_path / "signs.guard.npz").write_bytes(b"another's")
    assert "another model's" in fails(edgeguard, "add", *arguments)
    (tmp_path / "signs.guard.npz").write_bytes(content)
    ask(edgeguard, "add", *arguments)
    (released,) = (tmp_path / "release/targets").glob("*.npz")
    assert released.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("signs.guarded.tflite",), "either --replaces or --first"),
        (("signs.guarded.tflite", "--first", "--replaces", "x"), "either --replaces or --first"),
        (("nothing.tflite", "--first"), "nothing.tflite"),
        (("signs.guarded.tflite", "--replaces", "nothing.tflite"), "nothing.tflite"),
        (("signs.guarded.tflite", "--first", "--name", "No Name"), "release name"),
        (("keys", "--first"), "model keys"),
    ],
)
def test_a_release_that_cannot_be_is_one_clear_line(edgeguard: Run, arguments: tuple[str, ...], reason: str) -> None:
    init(edgeguard)
    assert reason in fails(edgeguard, "add", "release", *arguments, *ALL[1:])
    assert ask(edgeguard, "status", "release")["releases"] == 0


def test_the_hubs_keys_alone_release_nothing_offline(edgeguard: Run) -> None:
    init(edgeguard)
    line = fails(edgeguard, "add", "release", "signs.guarded.tflite", "--first", "--keys", "keys")
    assert "key of targets; got none at hand" in line
    assert "offline" in line


def test_what_is_signed_away_from_the_hub_is_published_by_it(edgeguard: Run) -> None:
    init(edgeguard)
    arguments = ("release", "signs.guarded.tflite", "--first", "--offline", "offline")
    assert not ask(edgeguard, "add", *arguments)["published"]
    code, out, _ = edgeguard("release", "status", "release")
    assert code == 1
    assert "draft of targets" in out
    assert ask(edgeguard, "renew", "release", "--keys", "keys")["releases"] == 1
    assert edgeguard("release", "status", "release")[0] == 0


def test_keys_are_rotated_and_old_files_stay(edgeguard: Run, tmp_path: Path) -> None:
    init(edgeguard)
    before = set(tmp_path.rglob("*.pem"))
    said = edgeguard("release", "rotate", "release", "timestamp", "snapshot", *ALL[1:])[1]
    assert said.startswith("keys now: timestamp: ")
    assert said.endswith("published\n")
    assert before < set(tmp_path.rglob("*.pem"))
    status = ask(edgeguard, "rotate", "release", "root", *ALL[1:], "--key", "new", "--key", "new", "--threshold", "2")
    root = status["roles"][0]
    assert (root["version"], root["threshold"], len(root["keys"])) == (3, 2, 2)
    status = ask(edgeguard, "rotate", "release", "root", *ALL[1:], "--keep", root["keys"][0][:8], "--key", "new")
    assert root["keys"][0] in status["roles"][0]["keys"]
    assert "expected one role" in fails(edgeguard, "rotate", "release", "root", "targets", *ALL[1:], "--key", "new")
    assert "--keep ffff" in fails(edgeguard, "rotate", "release", "root", *ALL[1:], "--keep", "ffff")


def test_a_stolen_key_for_repairs_is_replaced_and_repairs_are_taken_back(edgeguard: Run) -> None:
    init(edgeguard)
    assert "published" in edgeguard("release", "repair-key", *ALL)[1]
    assert "repair 7; got no such sequence" in fails(edgeguard, "repair-key", *ALL, "--withdraw", "7")
    repaired = ask(edgeguard, "repair-key", *ALL, "--countersigner", "new")["roles"][2]
    assert (repaired["role"], repaired["threshold"], len(repaired["keys"])) == ("repaired", 2, 2)
    repaired = ask(edgeguard, "repair-key", *ALL, "--no-countersigner")["roles"][2]
    assert (repaired["threshold"], len(repaired["keys"])) == (1, 1)


def test_several_people_sign_one_after_the_other(edgeguard: Run, tmp_path: Path) -> None:
    init(edgeguard, "--targets-key", "new", "--targets-key", "new", "--targets-threshold", "2")
    first, second = sorted((tmp_path / "offline").glob("targets-*.pem"))
    ask(edgeguard, "add", "release", "signs.guarded.tflite", "--first", "--keys", "keys", "--offline", first)
    line = edgeguard("release", "sign", "release", "--keys", "keys", "--offline", second)
    assert line[0] == 2
    assert "adds signs-1.tflite" in line[1]
    assert "give --yes" in line[2]
    signed = ask(edgeguard, "sign", "release", "--keys", "keys", "--offline", second, "--yes")
    assert (signed["releases"], signed["drafts"]) == (1, [])
    assert "there is nothing to sign" in fails(edgeguard, "sign", *ALL, "--yes")


def test_a_draft_can_be_discarded(edgeguard: Run) -> None:
    init(edgeguard)
    ask(edgeguard, "add", "release", "signs.guarded.tflite", "--first", "--offline", "offline")
    assert edgeguard("release", "sign", "release", "--discard")[1] == "discarded: targets\n"
    assert edgeguard("release", "status", "release")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("status", "nothing"), "none there; create it first: edgeguard release init"),
        (("status", "release", "--keys", "nothing"), "key nothing; got No such file"),
        (("status", "release", "--keys", "other"), "another repository"),
        (("renew", "release"), "too few at hand"),
        (("rotate", "release", "timestamp", "--offline", "offline"), "name it with --keys"),
        (("rotate", "release", "root", "--keys", "keys"), "name it with --offline"),
        (("repair-key", "release", "--countersigner", "x", "--no-countersigner"), "either --countersigner"),
        (("init", "new", "--keys", "k", "--offline", "o", "--root-threshold", "2"), "threshold of root; got 2"),
        (("init", "new", "--keys", "k", "--offline", "o", "--root-key", "env:NONE"), "no such environment variable"),
        (("init", "new", "--keys", "k", "--offline", "new/o"), "a folder apart"),
        (
            ("init", "new", "--keys", "k", "--offline", "o", "--repair-key", "env:KEY", "--countersigner", "env:KEY"),
            "the hub's and a countersigner's",
        ),
        (
            ("init", "new", "--keys", "k", "--offline", "o", "--targets-key", "env:KEY", "--countersigner", "env:KEY"),
            "for countersign; got a key of targets",
        ),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(edgeguard: Run, arguments: tuple[str, ...], reason: str) -> None:
    init(edgeguard)
    assert edgeguard("release", "init", "second", "--keys", "other", "--offline", "away")[0] == 0
    assert reason in fails(edgeguard, *arguments)
    assert not Path("new").exists()


def test_no_key_and_no_passphrase_is_printed(edgeguard: Run, tmp_path: Path) -> None:
    said = init(edgeguard, "--unencrypted")
    for command in (
        ("rotate", "release", "root"),
        ("repair-key", "release"),
        ("renew", "release"),
        ("status", "release"),
    ):
        said += "".join(edgeguard("release", *command, *ALL[1:])[1:])
    assert PASSPHRASE not in said
    for path in tmp_path.rglob("*.pem"):
        assert not any(line in said for line in path.read_text().splitlines() if "-----" not in line)


def test_damage_is_one_clear_line(edgeguard: Run, tmp_path: Path) -> None:
    init(edgeguard)
    shutil.copy(tmp_path / "release/metadata/1.root.json", tmp_path / "release/metadata/timestamp.json")
    assert "restore the folder from a backup" in fails(edgeguard, "status", "release")


@pytest.mark.parametrize("command", ["init", "add", "repair-key", "rotate", "sign", "renew", "status"])
def test_help_shows_an_example(edgeguard: Run, command: str) -> None:
    code, out, _ = edgeguard("release", command, "--help")
    assert code == 0
    assert f"edgeguard release {command}" in " ".join(out.split())
