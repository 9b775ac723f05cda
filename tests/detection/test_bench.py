"""Measuring: turns, heats, figures with their bounds, and what makes them doubtful."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest

from converters import calibration, flatbuffer
from converters.calibration import Guarded
from edgeguard.detection import bench, sidecar
from edgeguard.detection.bench import BARE, CASCADE, GUARDED, IN_BUDGET, VERDICT, Conditions, Reading, Samples
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from edgeguard.errors import ModelError
from tests.simulators.attacked import Attacked

COST = {BARE: 100_000, GUARDED: 104_000, VERDICT: 120_000}
"""What a run costs in the simulated laboratory, in nanoseconds."""


class Laboratory:
    """Contestants that take as long as they are told, by a simulated clock, and a record of what happened."""

    def __init__(self, *, opening_ns: int = 0, noise: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0
        self.opened: list[str] = []
        self.calls: list[tuple[str, int]] = []
        self._opening_ns, self._noise = opening_ns, noise

    def contestants(self) -> dict[str, bench.Open]:
        return {name: lambda name=name: self._open(name) for name in COST}  # type: ignore[misc]

    def _open(self, name: str) -> bench.Run:
        self.opened.append(name)
        first = True

        def run(number: int) -> int:
            nonlocal first
            self.calls.append((name, number))
            self.now += int(COST[name] * self._noise(self.now / 1e9)) + (self._opening_ns if first else 0)
            first = False
            return 2

        return run

    def measure(self, n: int) -> tuple[dict[str, Samples], list[Reading]]:
        return bench.measure(
            self.contestants(),
            n=n,
            look=lambda: Reading(temperature_c=self.now / 1e9),
            wall_ns=lambda: self.now,
            cpu_ns=lambda: 3 * self.now,
        )


def samples(*micros: float) -> Samples:
    return Samples(seconds=np.asarray(micros) / 1e6, cpu_s=0.5, inferences=2 * len(micros))


def test_every_contestant_is_timed_as_often_as_asked_for_and_for_what_it_took() -> None:
    measured, _ = Laboratory().measure(103)
    for name, cost in COST.items():
        assert len(measured[name].seconds) == 103
        assert measured[name].seconds == pytest.approx(cost / 1e9)
        assert measured[name].cpu_s == pytest.approx(103 * 3 * cost / 1e9)
        assert measured[name].inferences == 206


def test_contestants_take_turns_in_small_blocks_and_none_always_follows_the_same() -> None:
    laboratory = Laboratory()
    laboratory.measure(300)
    counts = dict.fromkeys(COST, 0)
    for name, _ in laboratory.calls:
        counts[name] += 1
        assert max(counts.values()) - min(counts.values()) <= bench.BLOCK
    changes = Counter((a, b) for (a, _), (b, _) in pairwise(laboratory.calls) if a != b)
    assert len(changes) == len(COST) * (len(COST) - 1)


def test_a_spell_of_noise_hits_all_alike() -> None:
    noisy = Laboratory(noise=lambda now: 3.0 if 0.02 < now < 0.06 else 1.0)
    measured, _ = noisy.measure(200)
    assert float(np.quantile(measured[BARE].seconds, 0.9)) == pytest.approx(300e-6)
    for row in bench.rows(measured):
        assert row.ratio_p50 == pytest.approx(COST[row.name] / COST[BARE])
        assert 1 / row.per_second == pytest.approx(
            COST[row.name] / COST[BARE] * float(measured[BARE].seconds.mean()), rel=0.1
        )


def test_each_heat_has_new_interpreters_and_what_they_take_to_get_going_is_not_timed() -> None:
    laboratory = Laboratory(opening_ns=10**9)
    measured, _ = laboratory.measure(50)
    assert Counter(laboratory.opened) == dict.fromkeys(COST, bench.HEATS)
    assert all(run.seconds.max() < 1e-3 for run in measured.values())


def test_inputs_are_taken_in_turn_from_heat_to_heat() -> None:
    laboratory = Laboratory()
    laboratory.measure(20)
    assert {number for name, number in laboratory.calls if name == VERDICT} == set(range(20))


def test_the_board_is_read_under_load_about_once_a_second_and_at_the_end() -> None:
    laboratory = Laboratory(noise=lambda now: 100.0)
    _, readings = laboratory.measure(100)
    moments = [reading.temperature_c or 0.0 for reading in readings]
    assert moments[0] > 0
    assert moments[-1] == laboratory.now / 1e9
    one_turn = bench.BLOCK * sum(COST.values()) * 100 / 1e9
    assert all(1.0 <= b - a <= 1.5 + one_turn for a, b in pairwise(moments[:-1]))


def test_progress_ends_with_all_runs_done() -> None:
    told: list[tuple[int, int]] = []
    bench.measure(
        Laboratory().contestants(), n=57, look=Reading, progress=lambda text, done, total: told.append((done, total))
    )
    assert told == sorted(told)
    assert told[-1] == (57, 57)


def test_a_row_says_what_one_input_takes() -> None:
    bare, guarded = bench.rows({BARE: samples(*range(1, 101)), GUARDED: samples(*range(2, 202, 2))}, power_w=5.0)
    assert (bare.n, bare.ratio_p50, bare.ratio_heats) == (100, 1.0, (1.0, 1.0))
    assert bare.p50_us == pytest.approx(50.5)
    assert guarded.p90_us == pytest.approx(2 * bare.p90_us)
    assert guarded.ratio_p50 == pytest.approx(2.0)
    assert guarded.ratio_heats == pytest.approx((2.0, 2.0))
    assert bare.per_second == pytest.approx(1e6 / 50.5)
    assert bare.cpu_s == pytest.approx(0.005)
    assert bare.inferences == 2.0
    assert bare.energy_j == pytest.approx(5.0 * 50.5e-6)


def test_without_a_bare_model_or_a_power_reading_ratio_and_energy_are_unknown() -> None:
    (row,) = bench.rows({GUARDED: samples(1, 2, 3)})
    assert (row.ratio_p50, row.ratio_heats, row.energy_j) == (None, None, None)


@pytest.mark.parametrize(
    ("values", "share", "bounds"),
    [
        (100, 0.5, (40, 61)),  # the ranks that tables give for a median of a hundred
        (100, 0.99, (97, None)),
        (5, 0.5, (None, None)),
        (6, 0.5, (1, 6)),
        (1, 0.9, (None, None)),
    ],
)
def test_a_percentile_has_the_bounds_that_its_ranks_allow(
    values: int, share: float, bounds: tuple[float | None, float | None]
) -> None:
    assert bench.interval(np.arange(1.0, values + 1), share) == bounds


def test_the_bounds_hold_the_true_percentile_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        low, high = bench.interval(np.sort(rng.exponential(size=1000)), 0.99)
        assert low is not None
        assert high is not None
        held += low <= -np.log(0.01) <= high
    assert held / 400 >= 0.93


@pytest.mark.parametrize(
    ("readings", "found"),
    [
        ([], Conditions(temperature_c=None, throttled=None, power_w=None, cpu_mhz=None)),
        ([Reading(), Reading()], Conditions(temperature_c=None, throttled=None, power_w=None, cpu_mhz=None)),
        (
            [
                Reading(temperature_c=50.0, throttled=False, power_w=4.0, cpu_mhz=1500.0),
                Reading(temperature_c=58.0, throttled=True, power_w=6.0, cpu_mhz=1000.0),
                Reading(temperature_c=55.0, throttled=False),
            ],
            Conditions(temperature_c=(50.0, 58.0), throttled=True, power_w=5.0, cpu_mhz=(1000.0, 1500.0)),
        ),
        (
            [Reading(throttled=False), Reading(throttled=False)],
            Conditions(temperature_c=None, throttled=False, power_w=None, cpu_mhz=None),
        ),
        (
            [Reading(throttled=False), Reading(throttled=None)],
            Conditions(temperature_c=None, throttled=None, power_w=None, cpu_mhz=None),
        ),
    ],
)
def test_readings_are_summed_up_and_what_is_unknown_stays_so(readings: list[Reading], found: Conditions) -> None:
    assert bench.conditions(readings) == found


STEADY = samples(*[100.0, 101.0] * 500)
QUIET = Conditions(temperature_c=(50.0, 51.0), throttled=False, power_w=None, cpu_mhz=(1500.0, 1500.0))


def test_nothing_is_said_of_a_long_quiet_run() -> None:
    assert bench.doubts({BARE: STEADY}, QUIET) == ()


@pytest.mark.parametrize(
    ("measured", "found", "said"),
    [
        (samples(*[100.0] * 999), QUIET, "999 runs are too few for p99"),
        (samples(*[100.0] * 500, *[106.0] * 500), QUIET, "noisy: p50 of the second half against the first: bare +6%"),
        (samples(*[106.0] * 500, *[100.0] * 500), QUIET, "bare -6%"),
        (STEADY, Conditions(temperature_c=None, throttled=True, power_w=None, cpu_mhz=None), "throttled"),
        (STEADY, Conditions(temperature_c=(50.0, 53.0), throttled=None, power_w=None, cpu_mhz=None), "50.0 to 53.0 C"),
        (
            STEADY,
            Conditions(temperature_c=None, throttled=None, power_w=None, cpu_mhz=(1000, 1500)),
            "1000 to 1500 MHz",
        ),
    ],
)
def test_what_makes_the_figures_doubtful_is_said(measured: Samples, found: Conditions, said: str) -> None:
    (line,) = bench.doubts({BARE: measured}, found)
    assert said in line


@pytest.fixture(scope="module")
def audited(attacked: Attacked) -> Guarded:
    """The attacked model, guarded, with a sidecar."""
    bare, plan = calibration.plan(attacked.conversion.bare)
    return calibration.guard_model(bare, plan, attacked.x_owner, sidecar=True)


def of_audited(audited: Guarded) -> sidecar.Sidecar:
    assert audited.sidecar is not None
    assert audited.metadata.sidecar_digest is not None
    return sidecar.decode(audited.sidecar, digest=audited.metadata.sidecar_digest, metadata=audited.metadata)


def test_the_cascade_looks_as_often_as_its_own_time_allows(attacked: Attacked, audited: Guarded) -> None:
    inputs = attacked.data.x_test.astype(np.uint8)

    def inferences(seconds_each: float) -> dict[str, int]:
        ticks = count()
        opened = bench.contestants(
            bare=audited.bare,
            guarded=audited.content,
            sidecar=of_audited(audited),
            inputs=inputs,
            clock=lambda: next(ticks) * seconds_each,
        )
        runs = {name: opened[name]() for name in (CASCADE, IN_BUDGET)}
        return {name: sum(run(number) for number in range(len(inputs))) for name, run in runs.items()}

    slow, fast = inferences(1.0), inferences(0.0)
    assert slow[CASCADE] > 1.2 * len(inputs)
    assert slow[IN_BUDGET] == pytest.approx(slow[CASCADE], rel=0.02)  # but for who is audited at random
    assert fast[CASCADE] == slow[CASCADE]
    assert fast[IN_BUDGET] <= len(inputs) + 3  # what is kept for inputs that are flagged already


def test_what_is_compared_is_what_there_is(attacked: Attacked, audited: Guarded) -> None:
    def names(**parts: object) -> list[str]:
        whole = {"bare": None, "guarded": None, "sidecar": None, "inputs": attacked.data.x_test, **parts}
        return list(bench.contestants(**whole))  # type: ignore[arg-type]

    assert names(bare=audited.bare) == [BARE]
    assert names(guarded=audited.content) == [GUARDED, VERDICT]
    everything = names(bare=audited.bare, guarded=audited.content, sidecar=of_audited(audited))
    assert everything == list(bench.MEANING)


def test_why_there_is_no_cascade_is_told(attacked: Attacked, audited: Guarded) -> None:
    made_without, made_with = GuardedModel.load(attacked.conversion.guarded), GuardedModel.load(audited.content)
    found = of_audited(audited)
    assert bench.why_no_cascade(made_without, None) == "the model was made without a sidecar"
    assert bench.why_no_cascade(made_with, None) == "the sidecar is not beside the model"
    assert bench.why_no_cascade(made_with, replace(found, stages={})) is not None
    assert bench.why_no_cascade(made_with, found) is None


def test_a_model_without_its_guard_must_say_the_same_bit_for_bit(attacked: Attacked) -> None:
    done = attacked.conversion
    guarded, inputs = TfliteModel(done.guarded), attacked.data.x_test
    bench.check_same_outputs(TfliteModel(done.bare), guarded, inputs)
    other = flatbuffer.parse(done.bare)
    largest = max((b for b in other.buffers if b.data is not None), key=lambda b: len(b.data))
    largest.data = np.asarray(largest.data, dtype=np.uint8)[::-1]
    with pytest.raises(ModelError, match="differ from those of the model without guard"):
        bench.check_same_outputs(TfliteModel(flatbuffer.pack(other)), guarded, inputs)


def test_random_inputs_fill_the_range_of_the_model(attacked: Attacked) -> None:
    guarded, bare = GuardedModel.load(attacked.conversion.guarded), TfliteModel(attacked.conversion.bare)
    pixels = bench.random_inputs(guarded, 50)
    guarded.check(pixels[0])
    assert (pixels.min(), pixels.max()) == (0, 255)
    raw = np.stack([bare.quantise(x) for x in bench.random_inputs(bare, 50)])
    limits = np.iinfo(bare.input_dtype)
    assert (raw.min(), raw.max()) == (limits.min, limits.max)


@pytest.mark.parametrize("guarded", [True, False])
def test_memory_is_that_of_a_process_of_its_own(attacked: Attacked, tmp_path: Path, guarded: bool) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(attacked.conversion.guarded if guarded else attacked.conversion.bare)
    found = bench.footprint(path)
    assert found.rss_mib is not None
    assert found.anon_mib is not None
    assert 5 < found.anon_mib < found.rss_mib < 150


def test_memory_of_what_does_not_run_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "no.tflite").write_bytes(b"no model")
    assert bench.footprint(tmp_path / "no.tflite") == bench.Footprint(rss_mib=None, anon_mib=None)


@pytest.mark.parametrize(
    ("status", "rss_mib", "anon_mib"),
    [
        ("Name:\tpython\nVmRSS:\t   2048 kB\nRssAnon:\t   1024 kB\n", 2.0, 1.0),
        ("VmRSS:\t   2048 kB\n", 2.0, None),
        ("", None, None),
    ],
)
def test_memory_that_the_system_does_not_tell_is_unknown(
    status: str, rss_mib: float | None, anon_mib: float | None
) -> None:
    assert bench.memory_in(status) == bench.Footprint(rss_mib=rss_mib, anon_mib=anon_mib)


def test_a_file_that_crashes_the_runtime_crashes_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(ModelError, match="died of SIGSEGV"):
        bench.footprint(tmp_path / "model.tflite")
