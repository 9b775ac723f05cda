"""Commands and replies on the wire: what is refused, and the ids that they share."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.contract import messages, topics
from edgeguard.contract.messages import (
    COMMANDS,
    MAX_COMMAND,
    REPLIES,
    Message,
    Ping,
    PingReply,
    Rank,
    Ranking,
    RankReply,
    Recalibrate,
    RecalibrateReply,
    Reply,
    TapRanking,
    Vote,
    VoteReply,
    decode,
    encode,
)
from edgeguard.errors import LinkError
from tests.simulators.examples import BOOT, DIGEST, EXAMPLES, ID

SHORTENED = {
    Rank: {"id": ID, "model_digest": DIGEST},
    PingReply: {"id": ID, "state": "failed"},
}


def test_every_command_has_a_reply() -> None:
    assert list(COMMANDS) == list(REPLIES) == ["ping", "restart", "rank", "vote", "recalibrate"]


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_is_made_without_its_kind_reads_as_that_kind(name: str) -> None:
    example = next(message for message in EXAMPLES if type(message) is REPLIES[name])
    assert isinstance(example, Reply)
    plain = Reply(id=example.id, state=example.state, reason=example.reason, result=example.result)
    assert encode(plain) == encode(example)
    assert decode(REPLIES[name], encode(Reply(id=ID, state="failed", reason="why"))).reason == "why"


@pytest.mark.parametrize(("kind", "fields"), SHORTENED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_may_be_left_out_may(kind: type[Message], fields: dict[str, object]) -> None:
    assert msgspec.to_builtins(decode(kind, msgspec.json.encode(fields))).items() >= fields.items()


@pytest.mark.parametrize("kind", COMMANDS.values())
@pytest.mark.parametrize("transaction", ["", "0" * 15, "0" * 65, "G" * 16, "A" * 16, "0" * 16 + "\n", 7, None])
def test_a_command_without_a_proper_id_is_refused(kind: type[messages.Command], transaction: object) -> None:
    example = next(message for message in EXAMPLES if type(message) is kind)
    fields = {**msgspec.to_builtins(example), "id": transaction}
    with pytest.raises(LinkError):
        decode(kind, msgspec.json.encode(fields))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Ping, {"v": 2}),
        (Rank, {"model_digest": "short"}),
        (Rank, {"layer": ""}),
        (Rank, {"layer": "x" * 513}),
        (Vote, {"layer": None}),
        (Vote, {"share": 0}),
        (Vote, {"share": 1}),
        (Vote, {"share": "half"}),
        (Recalibrate, {"source": "field"}),
        (Recalibrate, {"source": "/etc/passwd"}),
        (PingReply, {"state": "fine"}),
        (PingReply, {"result": None}),
        (PingReply, {"state": "failed"}),
        (PingReply, {"reason": "x" * 513}),
        (PingReply, {"result": {"boot": BOOT, "session": 1, "uptime_s": -1}}),
        (RankReply, {"result": {"model_digest": DIGEST, "inputs": 1, "taps": []}}),
        (VoteReply, {"result": {"model_digest": DIGEST, "layer": "a", "inputs": 1, "channels": [4096]}}),
        (VoteReply, {"result": {"model_digest": DIGEST, "layer": "a", "inputs": 1, "channels": [2, 1]}}),
        (VoteReply, {"result": {"model_digest": DIGEST, "layer": "a", "inputs": 1, "channels": [1, 1]}}),
        (RecalibrateReply, {"result": {"guard_digest": "new"}}),
    ],
)
def test_a_field_out_of_range_is_refused(kind: type[Message], change: dict[str, object]) -> None:
    example = next(message for message in EXAMPLES if type(message) is kind)
    with pytest.raises(LinkError):
        decode(kind, msgspec.json.encode({**msgspec.to_builtins(example), **change}))


@pytest.mark.parametrize("channels", [[0, 0], [1], [0, 2], [-1, 0], [*range(4097)]])
def test_a_ranking_names_each_channel_once(channels: list[int]) -> None:
    tap = {"tensor": "t", "source_layer": "s", "channels": channels}
    result = {"model_digest": DIGEST, "inputs": 1, "taps": [tap]}
    with pytest.raises(LinkError):
        decode(RankReply, msgspec.json.encode({"id": ID, "state": "ok", "result": result}))


def test_the_largest_command_is_within_the_limit_and_the_largest_reply_within_its_own() -> None:
    longest = "\U0001f600" * 512
    vote = Vote(id="f" * 64, model_digest=DIGEST, layer=longest, share=0.1234567890123456)
    assert decode(Vote, encode(vote), limit=MAX_COMMAND) == vote
    wide = TapRanking(tensor=longest, source_layer=longest, channels=tuple(range(messages.MAX_FEATURES)))
    reply = RankReply(id=ID, state="ok", result=Ranking(model_digest=DIGEST, inputs=2**53, taps=(wide,)))
    assert decode(RankReply, encode(reply)) == reply


def test_a_command_over_the_limit_is_refused_by_its_size() -> None:
    with pytest.raises(LinkError, match="4097 bytes"):
        decode(Ping, encode(Ping(id=ID)).ljust(MAX_COMMAND + 1), limit=MAX_COMMAND)


@given(st.integers(0, 2**48 - 1), st.text("0123456789abcdef", min_size=4, max_size=52))
def test_an_id_holds_the_time_at_which_it_was_made(at_ms: int, salt: str) -> None:
    made = messages.transaction(at_ms, salt)
    assert decode(Ping, encode(Ping(id=made))).id == made
    assert messages.issued_ms(made) == at_ms


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_reply_have_a_channel_each(name: str) -> None:
    for channel in (topics.command(name), topics.reply(name)):
        assert topics.parse(topics.topic("plant-1", "camera-1", channel)) == ("plant-1", "camera-1", channel)
    assert topics.command(name) != topics.reply(name)


@pytest.mark.parametrize("kind", [*COMMANDS.values(), *REPLIES.values(), messages.Ack, messages.Status])
def test_text_that_is_not_utf_8_is_refused_like_anything_else(kind: type[Message]) -> None:
    for field in ("id", "boot", "state", "reason"):
        with pytest.raises(LinkError):
            decode(kind, b'{"%s":"\xff","v":1}' % field.encode())
