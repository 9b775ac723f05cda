"""How active channels are: what is counted, what federated pruning is told of it, and what a restart finds."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.agent import ranks
from edgeguard.agent.ranks import MIN_INPUTS, SAVE_S, Activations, Activity, rank, vote
from edgeguard.contract.guard import Calibration, Detector, Environment, GuardMetadata, ModelInput, Tap
from edgeguard.contract.messages import Ballot, Rank, Ranking, RankReply, TapRanking, Vote, VoteReply, decode, encode
from edgeguard.errors import ConfigError

ID = "0" * 16
DIGEST, OTHER = "a" * 64, "b" * 64
DEEP_LINF = Tap(tensor="relu_2", source_layer="conv_2", kind="linf", offset=0, channels=6)
DEEP = Tap(tensor="relu_2", source_layer="conv_2", kind="l1", offset=6, channels=6)
SHALLOW = Tap(tensor="relu_1", source_layer="conv_1", kind="l1", offset=12, channels=4)
LOGIT = Tap(tensor="logits", source_layer="dense", kind="logit", offset=16, channels=3)
TAPS = (DEEP_LINF, DEEP, SHALLOW, LOGIT)
D = 19


def guard(model_digest: str = DIGEST, taps: tuple[Tap, ...] = TAPS) -> GuardMetadata:
    return GuardMetadata(
        model_digest=model_digest,
        guard_digest=OTHER,
        detectors=(Detector(name="l1", threshold=1.0),),
        taps=taps,
        class_output=0,
        classes=("a", "b", "c"),
        input=ModelInput(shape=(8, 8, 1), dtype="uint8", range=(0.0, 1.0)),
        fpr=0.01,
        fpr_upper=(0.02, 0.02, 0.02),
        score_to_p=(),
        calibration=Calibration(n_fit=1, n_threshold=1, digest=DIGEST),
        environment=Environment(runtime="litert", version="2", threads=1, cpu="any"),
    )


def features(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Features of some inputs, ``float32 [count, D]``: channels of very different activity."""
    generator = np.random.default_rng(seed)
    return (generator.gamma(2.0, size=(count, D)) * generator.uniform(0.01, 100, D)).astype(np.float32)


def counted(path: Path, rows: npt.NDArray[np.float32], metadata: GuardMetadata | None = None) -> Activations:
    activations = Activations(path)
    for row in rows:
        activations.add(metadata or guard(), row)
    return activations


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "activations.json"


def ranking(activity: Activity | None, layer: str | None = None) -> Ranking:
    outcome = rank(activity, Rank(id=ID, model_digest=DIGEST, layer=layer))
    assert isinstance(outcome.result, Ranking)
    return outcome.result


def ballot(activity: Activity | None, share: float, layer: str = "conv_2") -> Ballot:
    outcome = vote(activity, Vote(id=ID, model_digest=DIGEST, layer=layer, share=share))
    assert isinstance(outcome.result, Ballot)
    return outcome.result


def test_each_tap_is_ranked_by_the_mean_of_its_l1_features_least_active_first(path: Path) -> None:
    rows = features(500)
    found = ranking(counted(path, rows).activity(DIGEST))
    mean = rows.astype(np.float64).mean(axis=0)
    assert found == Ranking(
        model_digest=DIGEST,
        inputs=500,
        taps=(
            TapRanking(tensor="relu_2", source_layer="conv_2", channels=tuple(np.argsort(mean[6:12]).tolist())),
            TapRanking(tensor="relu_1", source_layer="conv_1", channels=tuple(np.argsort(mean[12:16]).tolist())),
        ),
    )


@pytest.mark.parametrize(
    ("layer", "tensors"), [(None, ["relu_2", "relu_1"]), ("conv_1", ["relu_1"]), ("relu_2", ["relu_2"])]
)
def test_a_rank_is_of_all_taps_or_of_the_one_that_is_named(path: Path, layer: str | None, tensors: list[str]) -> None:
    found = ranking(counted(path, features(MIN_INPUTS)).activity(DIGEST), layer)
    assert [tap.tensor for tap in found.taps] == tensors


@pytest.mark.parametrize(("share", "count"), [(0.01, 0), (0.25, 2), (0.5, 3), (0.75, 4), (0.99, 6)])
def test_a_vote_names_the_least_active_share_of_the_channels(path: Path, share: float, count: int) -> None:
    rows = features(MIN_INPUTS)
    found = ballot(counted(path, rows).activity(DIGEST), share)
    mean = rows.astype(np.float64).mean(axis=0)[6:12]
    assert set(found.channels) == set(np.argsort(mean)[:count].tolist())
    assert len(found.channels) == count == round(share * 6)


def test_what_a_server_makes_of_the_replies_is_what_it_would_make_of_the_activations(tmp_path: Path) -> None:
    fleet = [features(300, seed) for seed in range(9)]
    activity = [counted(tmp_path / f"{n}.json", rows).activity(DIGEST) for n, rows in enumerate(fleet)]
    ranked = [encode(RankReply(id=ID, state="ok", result=ranking(one, "conv_2"))) for one in activity]
    voted = [encode(VoteReply(id=ID, state="ok", result=ballot(one, 0.4))) for one in activity]

    # RAP: the mean over the clients of each channel's rank, least first; MVP: the number of votes, most first.
    positions, votes = np.zeros(6), np.zeros(6)
    for payload in ranked:
        result = decode(RankReply, payload).result
        assert result is not None
        positions[list(result.taps[0].channels)] += np.arange(6)
    for payload in voted:
        chosen = decode(VoteReply, payload).result
        assert chosen is not None
        votes[list(chosen.channels)] += 1

    means = np.stack([rows[:, 6:12].astype(np.float64).mean(axis=0) for rows in fleet])
    reference = (means[:, :, None] > means[:, None, :]).sum(axis=2)  # how many channels are less active
    np.testing.assert_array_equal(positions, reference.sum(axis=0))
    np.testing.assert_array_equal(votes, (reference < 2).sum(axis=0))


def test_channels_of_the_same_activity_stand_in_the_order_of_their_numbers(path: Path) -> None:
    rows = np.zeros((MIN_INPUTS, D), np.float32)
    rows[:, 8] = 1.0
    activity = counted(path, rows).activity(DIGEST)
    assert ranking(activity, "conv_2").taps[0].channels == (0, 1, 3, 4, 5, 2)
    assert ballot(activity, 0.5).channels == (0, 1, 3)


@pytest.mark.parametrize("inputs", [0, 1, MIN_INPUTS - 1])
def test_too_few_inputs_rank_nothing(path: Path, inputs: int) -> None:
    activity = counted(path, features(inputs)).activity(DIGEST)
    for outcome in (
        rank(activity, Rank(id=ID, model_digest=DIGEST)),
        vote(activity, Vote(id=ID, model_digest=DIGEST, layer="conv_2", share=0.5)),
    ):
        assert outcome.state == "refused" and f"at least {MIN_INPUTS}" in outcome.reason


def test_another_model_ranks_nothing(path: Path) -> None:
    activations = counted(path, features(MIN_INPUTS))
    assert activations.activity(OTHER) is None
    outcome = rank(activations.activity(OTHER), Rank(id=ID, model_digest=OTHER))
    assert outcome.state == "refused" and "no unflagged input of this model" in outcome.reason


@pytest.mark.parametrize("layer", ["conv_9", "dense", "logits"])
def test_a_layer_without_a_tap_is_refused_with_those_that_have_one(path: Path, layer: str) -> None:
    activity = counted(path, features(MIN_INPUTS)).activity(DIGEST)
    for outcome in (
        rank(activity, Rank(id=ID, model_digest=DIGEST, layer=layer)),
        vote(activity, Vote(id=ID, model_digest=DIGEST, layer=layer, share=0.5)),
    ):
        assert outcome.state == "refused" and "relu_2, relu_1" in outcome.reason


def test_a_vote_on_a_layer_with_two_taps_must_name_the_tensor(path: Path) -> None:
    taps = (DEEP_LINF, DEEP, msgspec.structs.replace(SHALLOW, source_layer="conv_2"), LOGIT)
    activity = counted(path, features(MIN_INPUTS), guard(taps=taps)).activity(DIGEST)
    assert vote(activity, Vote(id=ID, model_digest=DIGEST, layer="conv_2", share=0.5)).state == "refused"
    assert len(ballot(activity, 0.5, "relu_1").channels) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_input_that_was_not_checked_is_left_out(path: Path, value: float) -> None:
    rows = features(3)
    rows[1, 4] = value
    activity = counted(path, rows).activity(DIGEST)
    assert activity is not None and activity.inputs == 2
    np.testing.assert_allclose(activity.total, rows[[0, 2]].astype(np.float64).sum(axis=0))


def test_conditions_of_long_ago_fade(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "HALVE_AT", 1000)
    old, new = np.zeros(D, np.float32), np.zeros(D, np.float32)
    old[6], new[7] = 1.0, 1.0
    activations = Activations(path)
    seen = []
    for row in [old] * 999 + [new] * 2000:
        activations.add(guard(), row)
        activity = activations.activity(DIGEST)
        assert activity is not None and activity.inputs < 1000
        seen.append(sum(activity.total) / activity.inputs)
    assert seen == [1.0] * 2999
    assert activity is not None and activity.total[6] < 0.1 * activity.total[7]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), max_size=60))
def test_the_last_few_models_are_kept(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    activations = Activations(tmp_path_factory.mktemp("activations") / "a.json")
    for number in order:
        activations.add(guard(str(number) * 64), features(1)[0])
    last = list(dict.fromkeys(reversed(order)))[: ranks.MODELS]
    assert [n for n in range(6) if activations.activity(str(n) * 64) is not None] == sorted(last)


def test_a_restart_finds_what_was_saved(path: Path) -> None:
    rows = features(300)
    first = counted(path, rows)
    first.save(0.0)
    again = Activations(path)
    assert again.activity(DIGEST) == first.activity(DIGEST)
    again.add(guard(), rows[0])
    activity = again.activity(DIGEST)
    assert activity is not None and activity.inputs == 301


def test_the_file_is_written_every_few_minutes_and_only_when_there_is_something_new(path: Path) -> None:
    activations = Activations(path)
    activations.save(0.0)
    assert not path.exists()
    written = []
    for t in range(0, 1200, 10):
        if t < 700:
            activations.add(guard(), features(1)[0])
        before = path.read_bytes() if path.exists() else b""
        activations.save(float(t))
        if path.read_bytes() != before:
            written.append(t)
    assert written == [0, SAVE_S, 2 * SAVE_S, 3 * SAVE_S]


def test_a_model_whose_guard_taps_other_layers_begins_anew(path: Path) -> None:
    activations = counted(path, features(300))
    other = guard(taps=(DEEP_LINF, DEEP, msgspec.structs.replace(SHALLOW, tensor="relu_0"), LOGIT))
    activations.add(other, features(1)[0])
    activity = activations.activity(DIGEST)
    assert activity is not None and (activity.inputs, activity.taps) == (1, other.taps)


GOOD = Activity(model_digest=DIGEST, taps=TAPS, inputs=1, total=(1.0,) * D)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{" * 100_000,
        b'{"v":2,"models":[]}',
        b'{"models":[%s]}' % msgspec.json.encode(GOOD)[:-40],
        b'{"models":[%s]}' % msgspec.json.encode(GOOD).replace(b"[1.0,", b"[1e999,"),
        b'{"models":[%s]}' % msgspec.json.encode(GOOD).replace(b"[1.0,", b"["),
        b'{"models":[%s]}' % msgspec.json.encode(GOOD).replace(b'"inputs":1', b'"inputs":0'),
        b'{"models":[%s]}' % msgspec.json.encode(GOOD).replace(b'"offset":16', b'"offset":17'),
    ],
)
def test_a_damaged_file_is_counting_anew_and_no_obstacle(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    activations = Activations(path)
    assert activations.activity(DIGEST) is None
    activations.add(guard(), features(1)[0])
    activations.save(0.0)
    assert Activations(path).activity(DIGEST) == activations.activity(DIGEST)


def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path: Path) -> None:
    activations = counted(tmp_path / "missing" / "activations.json", features(1))
    with pytest.raises(ConfigError, match=r"activations .*activations\.json; got .*expected"):
        activations.save(0.0)
