"""Keys of the three parties: made once, read by their owner alone, and the same three for everybody."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest

from edgeguard.errors import ConfigError
from edgeguard.private import parties
from tests.simulators import private as making

NOW = datetime(2026, 11, 1, tzinfo=timezone.utc)


def create(folder: Path, name: str = "north") -> parties.Party:
    return parties.create(folder, name=name, host="127.0.0.1", port=9871, now=NOW)


def test_each_party_finds_its_own_place_among_the_three(tmp_path: Path) -> None:
    owns = making.parties(tmp_path)
    assert [own.index for own in owns] == [0, 1, 2]
    assert len({own.parties.digest for own in owns}) == 1


def test_a_party_trusts_the_two_others_and_not_itself(tmp_path: Path) -> None:
    owns = making.parties(tmp_path)
    peers = (owns[0].folder / parties.PEERS).read_text()
    assert [party.certificate in peers for party in owns[0].parties.parties] == [False, True, True]


@pytest.mark.parametrize("name", [parties.TLS_KEY, parties.SEALING_KEY])
def test_keys_are_their_owners_alone(tmp_path: Path, name: str) -> None:
    own = making.parties(tmp_path)[0]
    path = own.folder / name
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640"):
        parties.own(own.folder)


def test_no_private_key_stands_in_what_is_shown(tmp_path: Path) -> None:
    create(tmp_path / "north")
    shown = (tmp_path / "north" / parties.PUBLIC).read_text()
    assert "PRIVATE" not in shown
    assert (tmp_path / "north" / parties.SEALING_KEY).read_text() not in shown


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    create(tmp_path / "north")
    with pytest.raises(ConfigError, match="something is there already"):
        create(tmp_path / "north")


def test_one_party_cannot_stand_for_two(tmp_path: Path) -> None:
    for name in ("north", "south"):
        create(tmp_path / name, name)
    public = [tmp_path / name / parties.PUBLIC for name in ("north", "south", "south")]
    with pytest.raises(ConfigError, match="twice"):
        parties.join(tmp_path / "north", tuple(public))


def test_a_folder_that_joined_does_not_change_over_to_others(tmp_path: Path) -> None:
    owns = making.parties(tmp_path / "ours")
    making.parties(tmp_path / "theirs")
    public = tuple(tmp_path / "theirs" / name / parties.PUBLIC for name in making.NAMES)
    with pytest.raises(ConfigError, match="others are there already"):
        parties.join(owns[0].folder, public)


def test_a_party_that_is_none_of_the_three_is_told_so(tmp_path: Path) -> None:
    owns = making.parties(tmp_path)
    create(tmp_path / "stranger", "stranger")
    (tmp_path / "stranger" / parties.TOGETHER).write_bytes((owns[0].folder / parties.TOGETHER).read_bytes())
    with pytest.raises(ConfigError, match="none of the three"):
        parties.own(tmp_path / "stranger")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"parties": []}'])
def test_a_file_that_describes_no_parties_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / parties.TOGETHER
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"parties\.json"):
        parties.read(path)
