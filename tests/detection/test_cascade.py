"""The cascade: what counts towards its flag, what its limits survive, when it audits, and what that may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import calibration
from edgeguard.detection import cascade
from edgeguard.detection import sidecar as sidecars
from edgeguard.detection.cascade import Budget, Cascade, Limits, combined, limits_of, rarity
from edgeguard.detection.guarded import GuardedModel, Measured
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.statistics import SLACK, allowed_exceedances, binomial_cdf
from edgeguard.errors import ConfigError
from tests.simulators.attacked import Attacked

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

HUNDREDTHS = tuple(k / 100 for k in range(1, 100))
LIMITS = Limits(
    grey=0.5,
    again=0.7,
    threshold=1.2,
    moved={"squeezing": HUNDREDTHS, "strip 1": HUNDREDTHS, "strip 2": HUNDREDTHS},
    score_to_p=((0.5, 0.1), (1.0, 0.01)),
)
NOT_IMAGES = replace(LIMITS, moved=dict.fromkeys(cascade.ON_OTHERS, HUNDREDTHS))
COST = cascade.worst_cost(LIMITS)
FPR = 0.01

values = st.floats(0.0, 2.0)
scores = st.floats(0.0, 100.0)


# What counts towards the flag.


@given(scores, values, values, values)
def test_a_look_never_lowers_a_score(score: float, one: float, other: float, third: float) -> None:
    assert combined(score, {"squeezing": one, "strip 1": other, "strip 2": third}, LIMITS) >= score


@given(scores, values, values, values)
def test_a_steadier_answer_under_an_overlay_never_scores_lower(
    score: float, one: float, other: float, smoothed: float
) -> None:
    steady, wavering = sorted((one, other))
    assert combined(score, {"squeezing": smoothed, "strip 1": steady}, LIMITS) >= combined(
        score, {"squeezing": smoothed, "strip 1": wavering}, LIMITS
    )


def evidence(share: float) -> float:
    return 0.4 * max(0.0, -math.log10(share) - math.log10(math.e))


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        ({}, 0.0),
        ({"strip 1": 0.5}, 0.0),  # as half of the clean inputs
        ({"strip 1": 0.0}, evidence(1 / 100)),  # steadier than all of 99
        ({"strip 1": 0.095}, evidence(1 / 10)),  # nine are as steady
        ({"strip 1": 2.0}, 0.0),  # an overlay that changes the answer is nothing special
        ({"strip 1": 0.0, "strip 2": 0.0}, 2 * evidence(1 / 100)),
        ({"squeezing": 0.0}, evidence(1 / 100)),
        ({"squeezing": 2.0}, evidence(1 / 100)),  # smoothing that changes the answer is
        ({"squeezing": 0.905}, evidence(1 / 10)),
        ({"squeezing": 0.5, "strip 1": 0.0}, evidence(1 / 100)),
    ],
)
def test_an_answer_counts_by_how_rarely_clean_ones_move_so(measured: dict[str, float], factor: float) -> None:
    assert combined(0.8, measured, LIMITS) == pytest.approx(0.8 * math.exp(factor))


def test_one_look_cannot_count_for_more_than_its_cap_however_many_clean_inputs_it_was_compared_with() -> None:
    many = replace(LIMITS, moved={"strip 1": tuple(np.linspace(1.0, 2.0, 100_000).tolist())})
    assert combined(1.0, {"strip 1": 0.0}, many) == pytest.approx(combined(1.0, {"strip 1": 0.0}, LIMITS))


@given(st.sampled_from(cascade.ON_IMAGES), st.lists(values, max_size=30), values)
def test_the_share_of_clean_inputs_is_never_zero_and_at_most_all(
    look: str, reference: list[float], value: float
) -> None:
    assert 0.0 < rarity(look, tuple(sorted(reference)), value) <= 1.0


@pytest.mark.parametrize(
    ("look", "value", "share"),
    [
        ("strip 1", 0.0, 0.25),
        ("strip 1", 1.0, 0.5),
        ("strip 1", 1.5, 0.5),
        ("strip 1", 3.0, 1.0),
        ("squeezing", 0.0, 0.25),
        ("squeezing", 1.0, 0.5),
        ("squeezing", 2.0, 0.75),
        ("squeezing", 3.0, 0.5),
        ("squeezing", 3.5, 0.25),
    ],
)
def test_the_share_counts_the_input_itself(look: str, value: float, share: float) -> None:
    assert rarity(look, (1.0, 2.0, 3.0), value) == share


# Limits in the sidecar.


@pytest.mark.parametrize("limits", [LIMITS, NOT_IMAGES], ids=["images", "no images"])
def test_limits_survive_the_sidecar(limits: Limits) -> None:
    found = limits_of(limits.stages())
    assert found == limits
    assert list(found.moved) == list(limits.moved)  # the order of the looks


def test_a_stage_that_this_version_does_not_know_is_passed_over() -> None:
    assert limits_of({**LIMITS.stages(), "a later check": (1.0,)}) == LIMITS


@pytest.mark.parametrize("missing", ["cascade", "squeezing", "strip 1", "strip 2", "scores", "p_values"])
def test_stages_without_a_part_are_no_limits(missing: str) -> None:
    assert limits_of({name: numbers for name, numbers in LIMITS.stages().items() if name != missing}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"cascade": (0.5, 1.2)},
        {"cascade": (0.5, 0.7, 1.2, 8.0)},
        {"cascade": (0.0, 0.7, 1.2)},
        {"cascade": (0.5, 0.0, 1.2)},
        {"cascade": (0.5, 0.7, -1.2)},
        {"cascade": (math.nan, 0.7, 1.2)},
        {"cascade": (0.5, 0.7, math.nan)},
        {"strip 1": ()},
        {"scores": (1.0,)},
        {"scores": (1.0, 0.5)},
        {"p_values": (0.1, 0.0)},
        {"p_values": (1.5, 0.1)},
    ],
    ids=str,
)
def test_odd_stages_are_no_limits(changed: dict[str, tuple[float, ...]]) -> None:
    assert limits_of({**LIMITS.stages(), **changed}) is None


def test_a_sidecar_of_no_stages_holds_no_limits() -> None:
    assert limits_of({}) is None


# The looks at one input, and their calibration.


SURE, TURNED, HALF = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.5, 0.5])
OVERLAYS = np.zeros((3, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("score", "after", "looks"),
    [
        (0.55, HALF, ["squeezing"]),  # moved as usual, and not suspicious enough for more
        (0.55, SURE, ["squeezing", "strip 1", "strip 2"]),  # did not move at all
        (0.55, TURNED, ["squeezing", "strip 1", "strip 2"]),  # jumped
        (0.75, HALF, ["squeezing", "strip 1", "strip 2"]),
        (1.1, SURE, ["squeezing", "strip 1", "strip 2"]),  # flagged by then: how sure is that?
    ],
)
def test_there_are_as_many_looks_as_the_score_asks_for(score: float, after: Floats, looks: list[str]) -> None:
    calls: list[Array] = []

    def answer(x: Array) -> Floats:
        calls.append(x)
        return after if len(calls) == 1 else HALF

    limits = replace(
        LIMITS, moved=dict.fromkeys(LIMITS.moved, HUNDREDTHS) | {"squeezing": tuple(np.linspace(0.5, 1.5, 99))}
    )
    found = cascade.look(np.zeros((8, 8, 1), np.uint8), score, SURE, answer, OVERLAYS, limits)
    assert list(found) == looks
    assert len(calls) == len(looks)
    assert found["squeezing"] == np.abs(SURE - after).sum()


def test_each_overlay_is_laid_over_the_input_itself() -> None:
    seen: list[Array] = []

    def answer(x: Array) -> Floats:
        seen.append(x)
        return HALF

    overlays = np.stack([np.full((8, 8, 1), 10 * k, np.uint8) for k in (1, 2, 3)])
    x = np.full((8, 8, 1), 5, np.uint8)
    cascade.look(x, 0.75, SURE, answer, overlays, NOT_IMAGES)
    assert [int(image.max()) for image in seen] == [15, 25, 35]


def softened(x: Array) -> Floats:
    """Probabilities that depend on every number of an input."""
    logits = np.array([x.astype(np.float64).mean(), x.astype(np.float64).std(), 1.0])
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def made_up(
    rng: np.random.Generator, count: int = 400, shape: tuple[int, ...] = (5,)
) -> tuple[npt.NDArray[np.float32], Floats]:
    """Inputs that are no images, and scores for them."""
    return rng.normal(size=(count, *shape)).astype(np.float32), rng.gamma(4.0, 0.1, count)


@pytest.mark.parametrize(
    ("fit", "threshold", "overlays"),
    [(400, 198, 3), (50, 400, 3), (0, 400, 3), (400, 400, 2)],
    ids=["threshold half", "fit half", "no fit half", "overlays"],
)
def test_too_few_clean_inputs_calibrate_nothing(fit: int, threshold: int, overlays: int) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = made_up(rng, fit), made_up(rng, threshold)
    assert cascade.calibrate(*ours, *theirs, fpr=FPR, answer=softened, overlays=made_up(rng, overlays)[0]) is None


@pytest.mark.parametrize(
    ("inputs", "looks"),
    [
        (np.zeros((9, 8, 8, 3), np.uint8), cascade.ON_IMAGES),
        (np.zeros((9, 8, 8, 3), np.float32), cascade.ON_OTHERS),
        (np.zeros((9, 8, 3, 1), np.uint8), cascade.ON_OTHERS),
        (np.zeros((9, 64), np.uint8), cascade.ON_OTHERS),
    ],
    ids=["images", "numbers", "too narrow", "flat"],
)
def test_only_images_are_smoothed(inputs: Array, looks: tuple[str, ...]) -> None:
    assert cascade.looks_at(inputs) == looks


@pytest.mark.parametrize("fpr", [0.01, 0.02, 0.05])
def test_the_threshold_half_exceeds_the_threshold_as_often_as_the_order_statistic_allows(fpr: float) -> None:
    rng = np.random.default_rng(1)
    inputs, clean = made_up(rng)
    overlays = made_up(rng, 3)[0]
    limits = cascade.calibrate(*made_up(rng), inputs, clean, fpr=fpr, answer=softened, overlays=overlays)
    assert limits is not None
    final = []
    for x, score in zip(inputs, clean, strict=True):
        doubtful = score >= limits.grey
        found = cascade.look(x, score, softened(x), softened, overlays, limits) if doubtful else {}
        final.append(combined(float(score), found, limits))
    assert sum(one > limits.threshold for one in final) == allowed_exceedances(len(final), fpr)


def test_clean_inputs_take_as_many_looks_as_intended() -> None:
    rng = np.random.default_rng(2)
    overlays = made_up(rng, 3)[0]
    limits = cascade.calibrate(*made_up(rng), *made_up(rng), fpr=FPR, answer=softened, overlays=overlays)
    assert limits is not None
    taken = [
        len(cascade.look(x, score, softened(x), softened, overlays, limits)) if score >= limits.grey else 0
        for x, score in zip(*made_up(rng, 2000), strict=True)
    ]
    assert abs(np.mean([n >= 1 for n in taken]) - cascade.GREY) < 0.05
    assert abs(np.mean([n > 1 for n in taken]) - cascade.AGAIN) < 0.05


# The budget.


@pytest.mark.parametrize(
    ("per_second", "burst"),
    [(-1.0, 60.0), (10.0, -1.0), (math.nan, 60.0), (10.0, math.nan), (math.inf, 60.0)],
)
def test_a_budget_that_is_no_amount_is_refused(per_second: float, burst: float) -> None:
    with pytest.raises(ConfigError, match="audit budget"):
        Budget(per_second=per_second, burst=burst)


# A real model, its real sidecar, and a clock of the test's own.


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The attacked model with its sidecar, and inputs that neither has seen. ``one_pass``: scores of ``clean``."""

    guarded: calibration.Guarded
    model: GuardedModel
    sidecar: Sidecar
    limits: Limits
    clean: Array
    triggered: Array
    one_pass: Floats

    @property
    def clear(self) -> Array:
        """The clean input that the one pass suspects least."""
        return np.asarray(self.clean[self.one_pass.argmin()])

    @property
    def doubtful(self) -> Array:
        """Clean inputs [N, ...] in the grey zone, below 1."""
        return np.asarray(self.clean[(self.one_pass >= self.limits.grey) & (self.one_pass < 1.0)])

    def cascade(
        self,
        clock: Callable[[], float] | None = None,
        *,
        budget: Budget = cascade.UNLIMITED,
        audit_share: float = 0.0,
        seed: int = 0,
        **limits: Any,
    ) -> Cascade:
        """A runner; ``limits`` replace those of the sidecar."""
        stages = replace(self.limits, **limits).stages()
        return Cascade(
            self.model,
            replace(self.sidecar, stages=stages),
            clock=clock or Clock(),
            rng=np.random.default_rng(seed),
            budget=budget,
            audit_share=audit_share,
        )


def guard(attacked: Attacked, **options: Any) -> calibration.Guarded:
    bare, plan = calibration.plan(attacked.conversion.bare)
    return calibration.guard_model(bare, plan, attacked.x_owner, fpr=FPR, sidecar=True, **options)


def sidecar_of(guarded: calibration.Guarded) -> Sidecar:
    content, digest = guarded.sidecar, guarded.metadata.sidecar_digest
    assert content is not None
    assert digest is not None
    return sidecars.decode(content, digest=digest, metadata=guarded.metadata)


@pytest.fixture(scope="module")
def scene(attacked: Attacked) -> Scene:
    guarded = guard(attacked)
    model, sidecar = GuardedModel.load(guarded.content), sidecar_of(guarded)
    limits = limits_of(sidecar.stages)
    assert limits is not None
    clean = attacked.data.x_test.astype(np.uint8)
    return Scene(
        guarded=guarded,
        model=model,
        sidecar=sidecar,
        limits=limits,
        clean=clean,
        triggered=attacked.attack.stamp(clean[attacked.data.y_test != attacked.attack.target]),
        one_pass=np.array([model.infer(x).verdict.score for x in clean]),
    )


def test_a_clear_clean_input_takes_one_inference(scene: Scene) -> None:
    found, inferences = scene.cascade().infer(scene.clear)
    assert inferences == 1
    assert (found.verdict.status, found.verdict.audit, found.verdict.stages) == ("clean", "not needed", ("one-pass",))
    assert not found.verdict.evidence


def test_a_doubtful_input_is_looked_at_again_and_the_verdict_says_how(scene: Scene) -> None:
    runner = scene.cascade()
    for x in scene.doubtful:
        found, inferences = runner.infer(x)
        verdict = found.verdict
        looks = verdict.stages[1:]
        assert looks in {("squeezing",), ("squeezing", "strip 1", "strip 2")}
        assert (verdict.audit, inferences) == ("done", 1 + len(looks))
        assert tuple(verdict.evidence) == looks
        assert all(word in verdict.reason for word in (*looks, "moves the answer by", "together"))


def test_the_evidence_is_what_the_looks_measure(scene: Scene) -> None:
    logits = [
        column
        for tap in scene.model.metadata.taps
        if tap.kind == "logit"
        for column in range(tap.offset, tap.offset + tap.channels)
    ]

    def softmax(image: Array) -> Floats:
        powers = np.exp(scene.model.infer(image).features[logits].astype(np.float64))
        return np.asarray(powers / powers.sum())

    for x in scene.doubtful[:20]:
        alone = scene.model.infer(x).verdict.score
        expected = cascade.look(x, alone, softmax(x), softmax, scene.sidecar.overlays, scene.limits)
        verdict = scene.cascade().infer(x)[0].verdict
        assert verdict.evidence == pytest.approx(expected)
        assert verdict.score == pytest.approx(combined(alone, expected, scene.limits) / scene.limits.threshold)


def test_the_models_own_outputs_and_scores_stay_those_of_the_one_pass(scene: Scene) -> None:
    runner = scene.cascade(audit_share=1.0)
    for x in (*scene.doubtful[:5], *scene.triggered[:5], scene.clear):
        alone, found = scene.model.infer(x), runner.infer(x)[0]
        assert all(np.array_equal(a, b) for a, b in zip(alone.outputs, found.outputs, strict=True))
        assert (found.verdict.predicted, found.verdict.scores) == (alone.verdict.predicted, alone.verdict.scores)


def test_what_is_flagged_already_is_looked_at_out_of_its_own_part_of_the_budget(scene: Scene) -> None:
    high = [x for x in scene.triggered if scene.model.infer(x).verdict.score > scene.limits.threshold]
    cost = cascade.worst_cost(scene.limits)
    runner = scene.cascade(budget=Budget(per_second=0.0, burst=4 * cost))
    found = [runner.infer(x) for x in high[:10]]
    assert {inference.verdict.status for inference, _ in found} == {"flagged"}
    assert [inference.verdict.audit for inference, _ in found] == ["done"] + ["not needed"] * 9
    assert [inferences for _, inferences in found] == [1 + cost] + [1] * 9
    assert runner.infer(scene.doubtful[0])[0].verdict.audit == "done"  # these did not use up what others get


def test_a_look_at_what_is_flagged_already_does_not_clear_it(scene: Scene) -> None:
    runner = scene.cascade()
    for x in scene.triggered[:50]:
        alone = scene.model.infer(x).verdict.score
        if alone > scene.limits.threshold:
            verdict = runner.infer(x)[0].verdict
            assert verdict.flagged
            assert verdict.score >= alone / scene.limits.threshold - 1e-9


def test_a_doubtful_triggered_input_stands_out_by_its_steady_answer(scene: Scene) -> None:
    one_pass = np.array([scene.model.infer(x).verdict.score for x in scene.triggered])
    hidden = scene.triggered[one_pass.argsort()[:100]]
    level = 100.0 * float(one_pass.max())  # out of reach: nothing stops the looks
    runner = scene.cascade(threshold=level, again=1e-9)

    def gains(inputs: Array) -> Floats:
        verdicts = [runner.infer(x)[0].verdict for x in inputs]
        assert {v.audit for v in verdicts} == {"done"}
        return np.array([v.score * level / max(v.scores.values()) for v in verdicts])

    assert np.median(gains(hidden)) > np.quantile(gains(scene.doubtful), 0.9)


def test_without_a_budget_a_doubtful_input_is_not_audited_and_not_clean(scene: Scene) -> None:
    runner = scene.cascade(budget=Budget(per_second=0.0, burst=0.0))
    for x in scene.doubtful:
        found, inferences = runner.infer(x)
        assert inferences == 1
        assert (found.verdict.status, found.verdict.audit) == ("not audited", "no budget")
        assert not found.verdict.flagged
        assert "budget" in found.verdict.reason


def test_without_a_budget_the_one_pass_threshold_flags(scene: Scene) -> None:
    runner = scene.cascade(budget=Budget(per_second=0.0, burst=0.0), threshold=100.0)
    for x in scene.triggered[:20]:
        found, inferences = runner.infer(x)
        assert inferences == 1
        assert (found.verdict.status, found.verdict.audit) == ("flagged", "no budget")
        assert found.verdict.score == scene.model.infer(x).verdict.score


def test_without_a_budget_an_unsuspicious_input_that_was_drawn_stays_clean(scene: Scene) -> None:
    found, _ = scene.cascade(budget=Budget(per_second=0.0, burst=0.0), audit_share=1.0).infer(scene.clear)
    assert (found.verdict.status, found.verdict.audit) == ("clean", "not needed")


def test_an_audit_starts_only_when_all_that_it_can_take_is_there(scene: Scene) -> None:
    cost = cascade.worst_cost(scene.limits)
    for burst, audit in ((cost, "done"), (cost - 0.5, "no budget")):
        found, _ = scene.cascade(budget=Budget(per_second=0.0, burst=burst)).infer(scene.doubtful[0])
        assert found.verdict.audit == audit


def test_a_spent_budget_fills_with_time_but_not_above_its_burst(scene: Scene) -> None:
    clock, x = Clock(), scene.doubtful[0]
    runner = scene.cascade(clock, budget=Budget(per_second=2.0, burst=cascade.worst_cost(scene.limits)))

    def audits(count: int) -> list[str]:
        return [runner.infer(x)[0].verdict.audit for _ in range(count)]

    assert audits(2) == ["done", "no budget"]
    clock.now += 5.0
    assert audits(2) == ["done", "no budget"]
    clock.now += 1e6
    assert audits(2) == ["done", "no budget"]


@settings(max_examples=30, deadline=None)
@given(
    gaps=st.lists(st.sampled_from([0.0, 0.01, 0.5, 3.0, 100.0]), min_size=1, max_size=30),
    per_second=st.floats(0.0, 50.0),
    burst=st.floats(0.0, 80.0),
    audit_share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_no_period_takes_more_extra_inferences_than_its_budget(
    scene: Scene, gaps: list[float], per_second: float, burst: float, audit_share: float
) -> None:
    clock, stream = Clock(), (*scene.doubtful, scene.clear, *scene.clean[:10])
    runner = scene.cascade(clock, budget=Budget(per_second=per_second, burst=burst), audit_share=audit_share)
    at, extra = [], []
    for index, gap in enumerate(gaps):
        clock.now += gap
        at.append(clock.now)
        extra.append(runner.infer(stream[index % len(stream)])[1] - 1)
    for first in range(len(at)):
        for last in range(first, len(at)):
            allowed = burst + per_second * (at[last] - at[first])
            assert sum(extra[first : last + 1]) <= allowed + 1e-6


def test_an_unlimited_budget_audits_every_doubtful_input_at_once(scene: Scene) -> None:
    runner = scene.cascade(budget=cascade.UNLIMITED)
    many = [x for _ in range(5) for x in scene.doubtful]
    assert {runner.infer(x)[0].verdict.audit for x in many} == {"done"}


def test_a_share_of_one_audits_every_input(scene: Scene) -> None:
    runner = scene.cascade(audit_share=1.0)
    assert {runner.infer(x)[0].verdict.audit for x in scene.clean[scene.one_pass < scene.limits.grey]} == {"done"}


def test_a_share_is_drawn_by_the_callers_generator(scene: Scene) -> None:
    def audited(seed: int) -> list[int]:
        runner = scene.cascade(audit_share=0.2, seed=seed)
        clear = scene.clean[scene.one_pass < scene.limits.grey]
        return [i for i, x in enumerate(clear) if runner.infer(x)[0].verdict.audit == "done"]

    assert audited(1) == audited(1)
    assert audited(1) != audited(2)
    assert 0.1 <= len(audited(1)) / np.sum(scene.one_pass < scene.limits.grey) <= 0.3


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(scene: Scene, share: float) -> None:
    with pytest.raises(ConfigError, match="audit share"):
        scene.cascade(audit_share=share)


def test_the_same_generator_and_clock_give_the_same_verdicts(scene: Scene) -> None:
    def run() -> list[tuple[Any, int]]:
        clock = Clock()
        runner = scene.cascade(clock, budget=Budget(per_second=0.2, burst=6.0), audit_share=0.1, seed=7)
        found = []
        for x in (*scene.clean[:100], *scene.triggered[:20]):
            clock.now += 0.5
            inference, inferences = runner.infer(x)
            found.append((inference.verdict, inferences))
        return found

    once = run()
    assert once == run()
    assert {"done", "no budget", "not needed"} == {verdict.audit for verdict, _ in once}


# Where there is nothing to audit with.


def assert_the_one_pass_alone(runner: Cascade, model: GuardedModel, inputs: Array) -> None:
    assert runner.limits is None
    for x in inputs:
        found, inferences = runner.infer(x)
        alone = model.infer(x)
        assert inferences == 1
        assert found.verdict.audit == "not available"
        assert repr(found.verdict) == repr(alone.verdict)  # NaN, which a verdict may hold, equals nothing


def without(scene: Scene) -> Mapping[str, Sidecar | None]:
    few = len(cascade.OVERLAID) - 1
    return {
        "no sidecar": None,
        "no stages": replace(scene.sidecar, stages={}),
        "stages of another version": replace(scene.sidecar, stages={"strip": (0.25, 2.0)}),
        "no overlays": replace(scene.sidecar, overlays=scene.sidecar.overlays[:0]),
        "fewer overlays than calibrated with": replace(scene.sidecar, overlays=scene.sidecar.overlays[:few]),
        "looks that such inputs cannot take": replace(scene.sidecar, stages=NOT_IMAGES.stages()),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no sidecar",
        "no stages",
        "stages of another version",
        "no overlays",
        "fewer overlays than calibrated with",
        "looks that such inputs cannot take",
    ],
)
def test_a_model_without_usable_limits_is_judged_by_the_one_pass_alone(scene: Scene, case: str) -> None:
    runner = Cascade(scene.model, without(scene)[case], clock=Clock(), rng=np.random.default_rng(0), audit_share=1.0)
    assert_the_one_pass_alone(runner, scene.model, np.concatenate([scene.doubtful[:5], scene.triggered[:5]]))


def test_a_model_calibrated_on_made_up_inputs_stays_not_checked(attacked: Attacked, scene: Scene) -> None:
    model = GuardedModel.load(guard(attacked, synthetic=True).content)
    runner = Cascade(model, scene.sidecar, clock=Clock(), rng=np.random.default_rng(0), audit_share=1.0)
    assert_the_one_pass_alone(runner, model, scene.doubtful[:5])
    assert runner.infer(scene.clear)[0].verdict.status == "not checked"


def test_an_input_that_no_score_speaks_about_is_not_audited(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = scene.model.measure(scene.clear)._replace(scores={"linf": math.nan})

    def measure(_: Array) -> Measured:
        return lost

    monkeypatch.setattr(scene.model, "measure", measure)
    found, inferences = scene.cascade(audit_share=1.0).infer(scene.clear)
    assert (found.verdict.status, inferences) == ("not checked", 1)


# What conversion puts into the sidecar, and what is promised of the whole.


def test_a_model_with_classes_gets_limits_into_its_sidecar(scene: Scene) -> None:
    limits = scene.limits
    assert 0 < limits.grey < limits.threshold
    assert limits.grey < limits.again
    assert tuple(limits.moved) == cascade.ON_IMAGES
    assert {len(moved) for moved in limits.moved.values()} == {83}  # GREY of the fit half but for the overlays's 300
    assert all(0.0 <= moved[0] <= moved[-1] <= 2.0 + 1e-9 for moved in limits.moved.values())
    assert list(limits.score_to_p) == sorted(limits.score_to_p)
    assert min(p for _, p in limits.score_to_p) > 0.0


def test_fresh_clean_inputs_take_about_as_many_looks_as_intended(scene: Scene) -> None:
    runner = scene.cascade()
    taken = np.array([runner.infer(x)[1] - 1 for x in scene.clean])
    assert abs(np.mean(taken >= 1) - cascade.GREY) < 0.15
    assert abs(np.mean(taken > 1) - cascade.AGAIN) < 0.08


def test_a_model_calibrated_on_made_up_inputs_gets_none(attacked: Attacked) -> None:
    assert not sidecar_of(guard(attacked, synthetic=True)).stages


def test_of_the_threshold_half_the_cascade_flags_as_many_as_its_order_statistic_allows(
    attacked: Attacked, scene: Scene
) -> None:
    half = attacked.x_owner[calibration.halves(len(attacked.x_owner)).threshold]
    runner = scene.cascade()
    assert sum(runner.infer(x)[0].verdict.flagged for x in half) == allowed_exceedances(len(half), FPR)


@pytest.mark.parametrize("audit_share", [0.005, 1.0])
def test_clean_inputs_are_flagged_no_more_often_than_promised(scene: Scene, audit_share: float) -> None:
    runner = scene.cascade(audit_share=audit_share)
    flagged = sum(runner.infer(x)[0].verdict.flagged for x in scene.clean)
    as_many = 1.0 - binomial_cdf(flagged - 1, len(scene.clean), SLACK * FPR) if flagged else 1.0
    assert as_many > 0.01


def test_triggered_inputs_are_found(scene: Scene) -> None:
    runner = scene.cascade(audit_share=0.005)
    assert np.mean([runner.infer(x)[0].verdict.flagged for x in scene.triggered]) >= 0.99
