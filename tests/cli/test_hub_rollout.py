"""A roll-out on the command line: shown device by device, paused, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeguard.hub.cases import Released
from edgeguard.hub.members import Members
from edgeguard.hub.rollout import Member
from tests.cli.conftest import Run
from tests.hub.serving import NOW, serve
from tests.simulators import fleet

RELEASE = Released(
    target="t", sequence=2, model_digest=fleet.OTHER, guard_digest=fleet.GUARD, replaces=fleet.MODEL, at_ms=NOW
)


def test_a_roll_out_is_shown_and_steered(edgeguard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(tmp_path) as hub:
        monkeypatch.setenv("EDGEGUARD_URL", f"http://127.0.0.1:{hub.web.port}")
        monkeypatch.setenv("EDGEGUARD_TOKEN", hub.secrets["operator"])
        number = hub.add_case(state="rolling_out", release=RELEASE).id
        failed = Member(device="d1", group=0, offered_ms=NOW, state="failed", reason="refused (\x1b[2J)")
        with hub.store.write() as db:
            Members(hub.store).put(db, number, [failed])
        code, text, _ = edgeguard("hub", "rollout", number, "pause", "--why", "slow")
        assert code == 0
        assert "rolling_out, paused" in text
        assert "operator paused it: slow" in text
        assert "canary  failed" in text
        assert "\x1b" not in text
        code, _, error = edgeguard("hub", "rollout", number, "pause")
        assert code == 2
        assert "rolling_out, paused: nothing to pause" in error
        plain = hub.add_case().id
        assert "there is no release yet" in edgeguard("hub", "rollout", plain)[1]
