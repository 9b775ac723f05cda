"""What devices send: shares that add up, say nothing alone, and are good for one round, device and party only."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeguard.contract.private import Round, Submission
from edgeguard.errors import ConfigError, TrustError
from edgeguard.private import sharing
from edgeguard.private.parties import Own
from edgeguard.private.rounds import Ballots, once
from tests.simulators import private as making

CHANNELS = 8


@pytest.fixture(scope="module")
def owns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Own, ...]:
    return making.parties(tmp_path_factory.mktemp("parties"))


@dataclass
class Sent:
    asked: Round
    values: sharing.Values
    submission: Submission


def send(owns: tuple[Own, ...], device: str = "cam-1", **fields: object) -> Sent:
    asked = making.a_round(owns, channels=CHANNELS, **fields)
    values = sharing.values_of(asked, range(CHANNELS))
    return Sent(asked, values, making.submission(asked, owns, device, values))


def test_three_shares_add_up_to_what_was_submitted(owns: tuple[Own, ...]) -> None:
    sent = send(owns)
    shares = [
        sharing.opened(sent.asked, sent.submission, "cam-1", own.index, own.sealing).values.view(np.uint64)
        for own in owns
    ]
    assert (shares[0] + shares[1] + shares[2]).view(np.int64).tolist() == sent.values.tolist()


def test_votes_name_the_least_active_channels_and_ranks_their_places(owns: tuple[Own, ...]) -> None:
    ascending = [3, 1, 0, 2, 7, 6, 5, 4]
    votes = sharing.values_of(making.a_round(owns, channels=CHANNELS, kind="votes", prune=2), ascending)
    ranks = sharing.values_of(making.a_round(owns, channels=CHANNELS, kind="ranks"), ascending)
    assert votes.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert ranks.tolist() == [2, 1, 3, 0, 7, 6, 5, 4]


@pytest.mark.parametrize("ascending", [[0, 1], [0, 0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_a_ranking_that_does_not_name_each_channel_once_is_refused(owns: tuple[Own, ...], ascending: list[int]) -> None:
    with pytest.raises(ConfigError, match="each of 8 once"):
        sharing.values_of(making.a_round(owns, channels=CHANNELS), ascending)


@pytest.mark.parametrize("index", range(3))
def test_what_one_party_holds_is_uniform_whatever_was_submitted(owns: tuple[Own, ...], index: int) -> None:
    """Bits of many shares are ones half of the time, and as often for one input as for another (five sigma)."""
    asked = making.a_round(owns, channels=512)
    ones = []
    for values in (np.zeros(512, np.int64), np.full(512, 511, np.int64)):
        bits = [
            np.unpackbits(
                sharing.opened(
                    asked, making.submission(asked, owns, "cam-1", values), "cam-1", index, owns[index].sealing
                ).values.view(np.uint8)
            )
            for _ in range(4)
        ]
        ones.append(float(np.mean(bits)))
    sigma = 0.5 / np.sqrt(4 * 512 * 64)
    assert ones == pytest.approx([0.5, 0.5], abs=5 * sigma)


def test_messages_have_the_same_size_whatever_was_submitted(owns: tuple[Own, ...]) -> None:
    asked = making.a_round(owns, channels=CHANNELS)
    zeros, large = np.zeros(CHANNELS, np.int64), np.full(CHANNELS, 2**62, np.int64)
    sizes = {len(msgspec.json.encode(making.submission(asked, owns, "cam-1", v))) for v in (zeros, large)}
    assert len(sizes) == 1


def test_the_same_values_are_never_sent_alike_twice(owns: tuple[Own, ...]) -> None:
    one, other = send(owns).submission, send(owns).submission
    assert not set(one.sealed) & set(other.sealed)
    assert not set(one.commitments) & set(other.commitments)


def swapped(submission: Submission) -> Submission:
    first, second, third = submission.sealed
    return msgspec.structs.replace(submission, sealed=(second, first, third))


def committed_to_others(submission: Submission) -> Submission:
    return msgspec.structs.replace(submission, commitments=("0" * 64,) * 3)


def damaged(submission: Submission) -> Submission:
    box = bytearray(submission.sealed[0])
    box[-1] ^= 1
    return msgspec.structs.replace(submission, sealed=(bytes(box), *submission.sealed[1:]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swapped, "does not open"),
        (damaged, "does not open"),
        (committed_to_others, "commitment"),
        (lambda s: msgspec.structs.replace(s, round="0" * 64), "another round"),
        (lambda s: msgspec.structs.replace(s, device="cam-2"), "one of cam-2"),
    ],
)
def test_a_submission_that_is_not_as_it_was_made_is_refused(owns: tuple[Own, ...], change: object, reason: str) -> None:
    sent = send(owns)
    assert callable(change)
    with pytest.raises(TrustError, match=reason):
        sharing.opened(sent.asked, change(sent.submission), "cam-1", 0, owns[0].sealing)


def test_a_share_of_another_device_is_refused_under_ones_own_name(owns: tuple[Own, ...]) -> None:
    stolen = msgspec.structs.replace(send(owns, "cam-1").submission, device="cam-2")
    with pytest.raises(TrustError, match="another round, device or party"):
        sharing.opened(send(owns).asked, stolen, "cam-2", 0, owns[0].sealing)


def test_a_share_of_an_earlier_round_is_refused_under_a_later_ones_name(owns: tuple[Own, ...]) -> None:
    later = making.a_round(owns, channels=CHANNELS, id="round-0002")
    replayed = msgspec.structs.replace(send(owns).submission, round=later.digest)
    with pytest.raises(TrustError, match="another round, device or party"):
        sharing.opened(later, replayed, "cam-1", 0, owns[0].sealing)


def test_a_device_does_not_answer_a_round_for_parties_it_does_not_trust(owns: tuple[Own, ...], tmp_path: Path) -> None:
    others = making.parties(tmp_path)
    asked = making.a_round(others, channels=CHANNELS)
    with pytest.raises(TrustError, match="which this device trusts"):
        making.submission(asked, owns, "cam-1", sharing.values_of(asked, range(CHANNELS)))


def test_the_same_submission_again_changes_nothing(owns: tuple[Own, ...]) -> None:
    sent = send(owns)
    ballots = Ballots(sent.asked, owns[0])
    content = msgspec.json.encode(sent.submission)
    assert [ballots.add("cam-1", content) for _ in range(2)] == [True, True]
    assert len(ballots) == 1


def test_what_a_broker_repeats_of_an_earlier_round_keeps_nobody_out_of_this_one(owns: tuple[Own, ...]) -> None:
    earlier, now = send(owns, id="round-0000"), send(owns)
    ballots = Ballots(now.asked, owns[0])
    taken = [ballots.add("cam-1", msgspec.json.encode(s.submission)) for s in (earlier, now, earlier)]
    assert taken == [False, True, False]
    assert list(ballots.digests()) == ["cam-1"]
    assert not ballots.refused


def test_a_submission_is_made_once_and_then_sent_again_as_it_was(owns: tuple[Own, ...], tmp_path: Path) -> None:
    kept = [once(tmp_path / "kept.json", lambda: send(owns).submission) for _ in range(2)]
    assert kept[0] == kept[1]


def test_a_device_that_submits_two_different_things_is_left_out_for_good(owns: tuple[Own, ...]) -> None:
    one, other = send(owns), send(owns)
    ballots = Ballots(one.asked, owns[0])
    taken = [ballots.add("cam-1", msgspec.json.encode(s)) for s in (one.submission, other.submission, one.submission)]
    assert taken == [True, False, False]
    assert ballots.digests() == {}
    assert "two different" in ballots.refused["cam-1"]


NOT_UTF8 = b'{"v":1,"round":"\xff"}'


@given(content=st.binary(max_size=400))
@example(content=NOT_UTF8)
def test_bytes_from_outside_cost_their_own_device_alone(owns: tuple[Own, ...], content: bytes) -> None:
    sent = send(owns)
    ballots = Ballots(sent.asked, owns[0])
    ballots.add("cam-1", msgspec.json.encode(sent.submission))
    assert not ballots.add("cam-2", content)
    assert list(ballots.digests()) == ["cam-1"]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"b": "2", "a": "1"}), ("a", "b")),
        (({"a": "1", "b": "2"}, {"a": "1"}, {"b": "2", "a": "1"}), ("a",)),
        (({"a": "1"}, {"a": "2"}, {"a": "1"}), ()),
        (({"a": "1"}, {}, {"a": "1"}), ()),
    ],
    ids=["all alike", "one came late at one party", "told two parties different things", "one party holds nothing"],
)
def test_devices_count_whose_submission_all_parties_hold_alike(
    views: tuple[dict[str, str], ...], expected: tuple[str, ...]
) -> None:
    assert sharing.common(views) == expected


def test_random_bytes_cover_both_masks_and_all_nonces(owns: tuple[Own, ...]) -> None:
    asked = making.a_round(owns, channels=CHANNELS)
    values = sharing.values_of(asked, range(CHANNELS))
    random = secrets.token_bytes(sharing.random_bytes(asked))
    made = [sharing.submit(asked, "cam-1", values, owns[0].parties, r) for r in (random, random[:-1] + b"\0")]
    assert made[0].commitments[:2] == made[1].commitments[:2]
    assert made[0].commitments[2] != made[1].commitments[2] or random[-1] == 0
