"""What owners bring to an inspection and take from it: shares that are good once, and a pad that hides results."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeguard.contract.private import Inspection, Role
from edgeguard.errors import ConfigError, ModelError, TrustError
from edgeguard.private import inspections, owners
from edgeguard.private.parties import Own
from tests.simulators import private as making


@pytest.fixture(scope="module")
def owns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Own, ...]:
    return making.parties(tmp_path_factory.mktemp("parties"))


def given(owns: tuple[Own, ...], folder: Path, *, backdoored: bool = True) -> Inspection:
    asked = making.an_inspection(owns)
    making.give(asked, owns, folder, making.a_network(backdoored=backdoored), making.clean_inputs(24))
    return asked


def test_shares_of_three_parties_add_up_to_the_model_and_the_inputs(owns: tuple[Own, ...], tmp_path: Path) -> None:
    asked = given(owns, tmp_path / "given")
    held = [inspections.take(asked, tmp_path / "given", own) for own in owns]
    weights, inputs = (
        sum(h.values[role].view(np.uint64) for h in held).view(np.int64)  # type: ignore[union-attr]
        for role in inspections.ROLES
    )
    count = owners.weight_values(asked)
    np.testing.assert_allclose(
        weights[:count] / 2**16, np.concatenate([np.ravel(a) for a in making.a_network(backdoored=True)]), atol=1e-4
    )
    np.testing.assert_allclose(inputs / 2**16, np.ravel(making.clean_inputs(24)), atol=1e-4)


@pytest.mark.parametrize("role", inspections.ROLES)
def test_what_one_party_is_given_looks_random_and_is_as_long_whatever_it_says(
    owns: tuple[Own, ...], tmp_path: Path, role: Role
) -> None:
    """Bytes of a share are even: chi-squared with 255 degrees of freedom is below 360 but once in 100,000 times."""
    lengths = set()
    for backdoored in (True, False):
        folder = tmp_path / str(backdoored)
        asked = given(owns, folder, backdoored=backdoored)
        lengths.add((folder / f"{role}.json").stat().st_size)
        share = inspections.take(asked, folder, owns[2]).values[role]
        counts = np.bincount(np.frombuffer(share.tobytes(), np.uint8), minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 360
    assert len(lengths) == 1


def test_a_share_of_another_inspection_is_refused(owns: tuple[Own, ...], tmp_path: Path) -> None:
    given(owns, tmp_path / "given")
    other = making.an_inspection(owns, id="inspection-2")
    with pytest.raises(TrustError, match="another round"):
        inspections.take(other, tmp_path / "given", owns[0])


def test_a_share_that_is_sent_again_as_the_others_is_refused(owns: tuple[Own, ...], tmp_path: Path) -> None:
    """The model owner's, handed in once more as the data owner's."""
    asked = making.an_inspection(owns, sought=8, held_out=8)
    making.give(asked, owns, tmp_path / "given", making.a_network(backdoored=True), making.clean_inputs(16))
    (tmp_path / "given" / "data-owner.json").write_bytes((tmp_path / "given" / "model-owner.json").read_bytes())
    with pytest.raises(TrustError):
        inspections.take(asked, tmp_path / "given", owns[0])


def test_a_party_cannot_open_anothers_share(owns: tuple[Own, ...], tmp_path: Path) -> None:
    asked = given(owns, tmp_path / "given")
    thief = Own(index=1, parties=owns[0].parties, folder=owns[0].folder, sealing=owns[0].sealing)
    with pytest.raises(TrustError, match="key does not open"):
        inspections.take(asked, tmp_path / "given", thief)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 2000])
def test_a_file_that_is_no_share_is_one_clear_error(owns: tuple[Own, ...], tmp_path: Path, content: bytes) -> None:
    asked = given(owns, tmp_path / "given")
    (tmp_path / "given" / "model-owner.json").write_bytes(content)
    with pytest.raises(TrustError, match=r"model-owner\.json"):
        inspections.take(asked, tmp_path / "given", owns[0])


def test_an_owner_that_gave_nothing_is_named(owns: tuple[Own, ...], tmp_path: Path) -> None:
    asked = given(owns, tmp_path / "given")
    (tmp_path / "given" / "data-owner.json").unlink()
    with pytest.raises(ConfigError, match="get it from the data-owner"):
        inspections.take(asked, tmp_path / "given", owns[0])


def test_who_knows_the_pad_reads_a_trigger_and_who_does_not_reads_noise() -> None:
    asked = making.an_inspection()
    pad = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, owners.pad_values(asked))
    a, b = np.zeros((6, 25)), np.zeros((6, 25))
    a[2, 24], b[2, 3] = 0.75, 0.5
    plain = np.round(np.ravel([a, b]) * 2**16).astype(np.int64)
    padded = plain + pad[: owners.trigger_values(asked)]
    (found,) = owners.triggers(asked, padded, pad, [2])
    assert (found.mask[24], found.pattern[24], found.mask[3], found.pattern[3]) == (0.75, 1.0, 0.5, 0.0)
    counts = np.bincount(np.frombuffer(padded.tobytes(), np.uint8), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 360


def test_numbers_that_no_network_has_are_noise_and_not_a_result() -> None:
    asked = making.an_inspection()
    pad = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, owners.pad_values(asked))
    with pytest.raises(ModelError, match=r"noise.*this very result"):
        owners.triggers(asked, np.zeros(owners.trigger_values(asked), np.int64), pad, [2])
    with pytest.raises(ModelError, match=r"noise.*this very result"):
        owners.last_layer(asked, np.zeros(owners.last_values(asked), np.int64), pad)


@pytest.mark.parametrize(
    ("fields", "given"),
    [({"inspection": "1" * 64}, "one other"), ({"values": b"short"}, "one other"), ({}, "other one")],
)
def test_a_pad_is_good_for_its_plan_and_for_what_was_given_with_it(fields: dict[str, object], given: str) -> None:
    asked = making.an_inspection()
    values = b"\x01" * (8 * owners.pad_values(asked))
    pad = owners.Pad(inspection=asked.digest, given="one", weights="", values=values)
    assert len(pad.of(asked, "one other")) == owners.pad_values(asked)
    with pytest.raises(ModelError, match="this very result"):
        msgspec.structs.replace(pad, **fields).of(asked, given)


def test_of_two_networks_of_one_shape_the_digest_says_which() -> None:
    asked = making.an_inspection()
    one, other = (owners.weights_digest(asked, making.a_network(backdoored=backdoored)) for backdoored in (True, False))
    assert one != other
    assert one == owners.weights_digest(asked, making.a_network(backdoored=True))


def test_parties_go_on_from_the_last_moment_of_one_run_that_all_kept() -> None:
    views = [[[4, "a"], [8, "a"]], [[4, "a"], [8, "b"]], [[4, "a"], [8, "a"], [12, "a"]]]
    assert inspections._common(views) == (4, "a")
    assert inspections._common([[[8, "a"]], [[8, "b"]], [[8, "a"]]]) is None
    with pytest.raises(TrustError):
        inspections._common([[[4, "a"]], "no list", [[4, "a"]]])


def test_what_is_kept_now_stays_whatever_other_runs_left(tmp_path: Path) -> None:
    asked = making.an_inspection()
    one, other = (inspections.Held(values={}, digest=digest) for digest in ("one", "other"))
    inspections._keep(asked, other, "old", tmp_path, 60, {})
    inspections._keep(asked, other, "old", tmp_path, 6, {})
    for done in (4, 8, 12):
        inspections._keep(asked, one, "new", tmp_path, done, {})
    assert sorted(inspections._states(asked, one, tmp_path)) == [(8, "new"), (12, "new")]


def test_a_result_of_other_shares_is_not_given_again(tmp_path: Path) -> None:
    found = inspections.Inspected(inspection="i", given="one", verdict="no_sign", labels=(), padded=b"")
    path = tmp_path / inspections.INSPECTED
    path.write_bytes(msgspec.json.encode(found))
    assert inspections.result(path, inspections.Inspected, inspections.Held(values={}, digest="one")) == found
    with pytest.raises(ConfigError, match="make a new plan"):
        inspections.result(path, inspections.Inspected, inspections.Held(values={}, digest="other"))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_result_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / inspections.INSPECTED
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"inspected\.json"):
        inspections.result(path, inspections.Inspected)


@pytest.mark.parametrize("bad", [np.nan, 5000.0])
def test_weights_that_the_computation_cannot_hold_are_refused(bad: float) -> None:
    asked, network = making.an_inspection(), making.a_network(backdoored=False)
    network[0][0, 0] = bad
    with pytest.raises(ModelError, match="weights"):
        owners.model_values(asked, network, np.zeros(owners.pad_values(asked), np.int64))


@pytest.mark.parametrize("bad", [-0.1, 1.5, np.nan])
def test_inputs_beyond_their_range_are_refused(bad: float) -> None:
    inputs = making.clean_inputs(24)
    inputs[0, 0] = bad
    with pytest.raises(ModelError, match="inputs"):
        owners.data_values(making.an_inspection(), inputs)


@pytest.mark.parametrize("fields", [{"layers": (25, 7, 3)}, {"prune": 7}, {"layers": (25,)}, {"steps": 0}])
def test_an_inspection_that_cannot_be_is_refused_when_read(fields: dict[str, object]) -> None:
    plain = msgspec.to_builtins(making.an_inspection()) | fields
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(plain), type=Inspection)
