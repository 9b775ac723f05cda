"""A device's own rules for a release, and how it starts and hears of a fetch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeguard.errors import ConfigError, TrustError
from edgeguard.release.client import (
    FetchRequest,
    FetchResult,
    Hint,
    Running,
    TargetInfo,
    check_name,
    check_target,
    read_outcome,
    spawn_fetch,
)

OLD, NEW, GUARD = "0" * 64, "1" * 64, "2" * 64
HINT = Hint(target="digits-3.tflite", sequence=3)
RUNNING = Running(model_digest=OLD, sequence=2)
SIGNED: dict[str, object] = {"sequence": 3, "model_digest": NEW, "guard_digest": GUARD, "replaces": OLD}


def test_a_newer_release_made_for_the_running_model_is_taken() -> None:
    assert check_target({"edgeguard": SIGNED}, HINT, RUNNING) == TargetInfo(
        sequence=3, model_digest=NEW, guard_digest=GUARD, replaces=OLD
    )


def test_fields_that_a_later_version_signs_are_ignored() -> None:
    assert check_target({"edgeguard": {**SIGNED, "more": 1}, "other": 2}, HINT, RUNNING).sequence == 3


def test_a_device_without_a_model_takes_a_first_release() -> None:
    assert check_target({"edgeguard": {**SIGNED, "replaces": None}}, HINT, None).replaces is None


@pytest.mark.parametrize(
    ("signed", "running"),
    [
        pytest.param({**SIGNED, "sequence": 4}, RUNNING, id="another sequence than hinted"),
        pytest.param(SIGNED, Running(model_digest=OLD, sequence=3), id="the sequence that runs"),
        pytest.param(SIGNED, Running(model_digest=OLD, sequence=9), id="an older sequence"),
        pytest.param({**SIGNED, "replaces": NEW}, RUNNING, id="made for another model"),
        pytest.param({**SIGNED, "replaces": None}, RUNNING, id="a first release over a running model"),
        pytest.param(SIGNED, None, id="a replacement on a device without a model"),
    ],
)
def test_a_signed_release_that_is_not_for_this_device_now_is_refused(signed: object, running: Running | None) -> None:
    with pytest.raises(TrustError, match=r"digits-3\.tflite"):
        check_target({"edgeguard": signed}, HINT, running)


@pytest.mark.parametrize(
    "custom",
    [
        None,
        [],
        "edgeguard",
        {},
        {"edgeguard": None},
        {"edgeguard": []},
        {"edgeguard": {key: value for key, value in SIGNED.items() if key != "replaces"}},
        {"edgeguard": {**SIGNED, "sequence": "3"}},
        {"edgeguard": {**SIGNED, "sequence": True}},
        {"edgeguard": {**SIGNED, "sequence": 3.0}},
        {"edgeguard": {**SIGNED, "sequence": -3}},
        {"edgeguard": {**SIGNED, "model_digest": "1" * 63}},
        {"edgeguard": {**SIGNED, "guard_digest": "G" * 64}},
        {1: SIGNED},
    ],
)
def test_custom_metadata_that_describes_no_release_is_refused(custom: object) -> None:
    with pytest.raises(TrustError, match="signed description"):
        check_target(custom, HINT, RUNNING)


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x.tflite",
        "a/../../x.tflite",
        "a/./x.tflite",
        "/etc/x",
        "a//x",
        "a/",
        "",
        "a\\..\\x",
        "a\nb",
        "a\0b",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(TrustError):
        check_name(name)


@pytest.mark.parametrize("name", ["digits-3.tflite", "fleet/digits-3.tflite", "a..b.tflite"])
def test_a_plain_name_is_taken(name: str) -> None:
    check_name(name)


def request(folder: Path, url: str = "http://127.0.0.1:1/") -> FetchRequest:
    return FetchRequest(
        metadata_url=url,
        targets_url=url,
        metadata_dir=str(folder / "metadata"),
        root=str(folder / "root.json"),
        target="digits-3.tflite",
        sequence=3,
        running_model_digest=OLD,
        running_sequence=2,
        staging_dir=str(folder / "staging"),
    )


def test_a_signal_from_the_terminal_does_not_reach_the_fetch(tmp_path: Path) -> None:
    process = spawn_fetch(request(tmp_path))
    assert os.getsid(process.pid) == process.pid
    result = outcome(process)
    assert result is not None
    assert result.state == "failed"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/", "/metadata", "http://", "", "http://host/?a=", "HTTP//x"]
)
def test_an_address_that_is_not_http_starts_nothing(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="metadata_url") as error:
        spawn_fetch(request(tmp_path, url))
    assert "\n" not in str(error.value)


def test_a_staging_folder_that_cannot_be_made_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("a file")
    with pytest.raises(ConfigError, match="staging"):
        spawn_fetch(request(tmp_path))


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def outcome(process: subprocess.Popen[bytes]) -> FetchResult | None:
    process.wait(60)
    return read_outcome(process)


def test_a_fetch_that_still_runs_has_no_outcome() -> None:
    process = python("input()")
    assert read_outcome(process) is None
    process.kill()
    assert outcome(process) == FetchResult(state="failed", reason="the fetch ended without a result, exit code -9")


@pytest.mark.parametrize(
    "output",
    [
        "",
        "{",
        "[" * 5000,
        '{"state":"fetched"}',
        '{"state":"unknown"}',
        '{"state":"fetched","path":"/x","sequence":3,"model_digest":"x"}',
        '{"state":"refused","reason":"%s"}' % ("x" * 600),
    ],
)
def test_a_child_that_says_anything_else_has_failed(output: str) -> None:
    result = outcome(python(f"print({output!r})"))
    assert result is not None
    assert result.state == "failed"
    assert "the fetch ended" in result.reason


def test_what_the_agent_imports_holds_no_tuf_and_nothing_heavy() -> None:
    code = (
        "import sys, edgeguard.release.client, firmware_bridge.slots;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'tuf', 'securesystemslib', 'cryptography',"
        " 'urllib3', 'requests', 'numpy', 'tensorflow', 'typer', 'ssl'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
