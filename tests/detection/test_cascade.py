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
from edgeguard.detection.cascade import Budget, Cascade, Limits, combined, limits_of, share_at_least_as_steady
from edgeguard.detection.guarded import GuardedModel, Inference
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.statistics import SLACK, allowed_exceedances, binomial_cdf
from edgeguard.detection.strip import StripLimits, entropy
from edgeguard.errors import ConfigError
from tests.simulators.attacked import Attacked

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

HUNDREDTHS = tuple(k / 100 for k in range(1, 100))
LIMITS = Limits(
    grey=0.5,
    threshold=1.2,
    strip=StripLimits(threshold=0.4, spread=0.2),
    entropies=HUNDREDTHS,
    distances=HUNDREDTHS,
    score_to_p=((0.5, 0.1), (1.0, 0.01)),
)
COST = cascade.worst_cost(LIMITS)
FPR = 0.01

values = st.floats(0.0, 4.0)
scores = st.floats(0.0, 100.0)


# What counts towards the flag.


@given(scores, values, values)
def test_a_check_never_lowers_a_score(score: float, steadiness: float, moved: float) -> None:
    assert combined(score, {"strip": steadiness, "squeezing": moved}, LIMITS) >= score


@given(scores, values, values, values)
def test_a_steadier_answer_never_scores_lower(score: float, one: float, other: float, moved: float) -> None:
    steady, wavering = sorted((one, other))
    assert combined(score, {"strip": steady, "squeezing": moved}, LIMITS) >= combined(
        score, {"strip": wavering, "squeezing": moved}, LIMITS
    )
    assert combined(score, {"strip": moved, "squeezing": steady}, LIMITS) >= combined(
        score, {"strip": moved, "squeezing": wavering}, LIMITS
    )


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        ({}, 1.0),
        ({"strip": 0.5}, 1.0),  # as half of the clean inputs
        ({"strip": 0.0}, math.exp(0.25 * (2.0 - math.log10(math.e)))),  # steadier than all of 99: a share of 1/100
        ({"strip": 0.095}, math.exp(0.25 * (1.0 - math.log10(math.e)))),  # nine are as steady: a share of 1/10
        ({"strip": 0.0, "squeezing": 0.0}, math.exp(0.5 * (2.0 - math.log10(math.e)))),
        ({"strip": 0.0, "squeezing": 0.99}, math.exp(0.25 * (2.0 - math.log10(math.e)))),
    ],
)
def test_steadiness_counts_by_how_rare_it_is_among_clean_inputs(measured: dict[str, float], factor: float) -> None:
    assert combined(0.8, measured, LIMITS) == pytest.approx(0.8 * factor)


def test_one_check_cannot_count_for_more_than_its_cap_however_many_clean_inputs_it_was_compared_with() -> None:
    many = replace(LIMITS, entropies=tuple(np.linspace(1.0, 2.0, 100_000).tolist()))
    assert combined(1.0, {"strip": 0.0}, many) == pytest.approx(combined(1.0, {"strip": 0.0}, LIMITS))


def test_a_check_that_nothing_is_known_of_does_not_count() -> None:
    assert combined(0.8, {"squeezing": 0.0}, replace(LIMITS, distances=())) == 0.8


@given(st.lists(values, max_size=30), values)
def test_the_share_of_clean_inputs_is_never_zero_and_at_most_all(reference: list[float], value: float) -> None:
    assert 0.0 < share_at_least_as_steady(tuple(sorted(reference)), value) <= 1.0


@pytest.mark.parametrize(("value", "share"), [(0.0, 0.25), (1.0, 0.5), (1.5, 0.5), (3.0, 1.0)])
def test_the_share_counts_the_input_itself(value: float, share: float) -> None:
    assert share_at_least_as_steady((1.0, 2.0, 3.0), value) == share


# Limits in the sidecar.


@pytest.mark.parametrize("distances", [HUNDREDTHS, ()], ids=["images", "no images"])
def test_limits_survive_the_sidecar(distances: tuple[float, ...]) -> None:
    limits = replace(LIMITS, distances=distances)
    assert limits_of(limits.stages()) == limits


def test_a_stage_that_this_version_does_not_know_is_passed_over() -> None:
    assert limits_of({**LIMITS.stages(), "a later check": (1.0,)}) == LIMITS


@pytest.mark.parametrize("missing", ["cascade", "entropies", "scores", "p_values"])
def test_stages_without_a_part_are_no_limits(missing: str) -> None:
    assert limits_of({name: numbers for name, numbers in LIMITS.stages().items() if name != missing}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"cascade": (0.5, 1.2, 0.4)},
        {"cascade": (0.5, 1.2, 0.4, 0.2, 8.0)},
        {"cascade": (0.0, 1.2, 0.4, 0.2)},
        {"cascade": (0.5, -1.2, 0.4, 0.2)},
        {"cascade": (math.nan, 1.2, 0.4, 0.2)},
        {"cascade": (0.5, math.nan, 0.4, 0.2)},
        {"cascade": (0.5, 1.2, 0.4, -0.2)},
        {"entropies": ()},
        {"scores": (1.0,)},
    ],
    ids=str,
)
def test_odd_stages_are_no_limits(changed: dict[str, tuple[float, ...]]) -> None:
    assert limits_of({**LIMITS.stages(), **changed}) is None


def test_a_sidecar_of_no_stages_holds_no_limits() -> None:
    assert limits_of({}) is None


# The checks on one input, and their calibration.


@pytest.mark.parametrize(
    ("squeeze", "before", "forwards"), [(False, False, 8), (True, True, 10), (True, False, 11), (False, True, 8)]
)
def test_a_check_counts_the_inferences_that_it_took(squeeze: bool, before: bool, forwards: int) -> None:
    calls: list[Array] = []

    def answer(x: Array) -> Floats:
        calls.append(x)
        return np.array([0.5, 0.5])

    x, overlays = np.zeros((8, 8, 1), np.uint8), np.zeros((32, 8, 8, 1), np.uint8)
    known = np.array([0.5, 0.5]) if before else None
    found = cascade.check(x, answer, overlays, None, squeeze=squeeze, before=known)
    assert found.forwards == len(calls) == forwards
    assert found.values == {"strip": 1.0, **({"squeezing": 0.0} if squeeze else {})}


def test_what_squeezing_moves_is_measured_against_the_answer_to_the_input_itself() -> None:
    def dark(x: Array) -> Floats:
        return np.array([1.0, 0.0]) if x.max() < 10 else np.array([0.0, 1.0])

    dot = np.zeros((8, 8, 1), np.uint8)
    dot[4, 4] = 255  # a median filter takes it away
    found = cascade.check(dot, dark, np.zeros((8, 8, 8, 1), np.uint8), None, squeeze=True)
    assert found.values["squeezing"] == 2.0


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
    [(400, 198, 8), (19, 400, 8), (400, 400, 7)],
    ids=["threshold half", "fit half", "overlays"],
)
def test_too_few_clean_inputs_calibrate_nothing(fit: int, threshold: int, overlays: int) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = made_up(rng, fit), made_up(rng, threshold)
    assert cascade.calibrate(*ours, *theirs, fpr=FPR, answer=softened, overlays=made_up(rng, overlays)[0]) is None


def test_inputs_that_are_no_images_are_not_squeezed() -> None:
    rng = np.random.default_rng(0)
    limits = cascade.calibrate(
        *made_up(rng), *made_up(rng), fpr=FPR, answer=softened, overlays=made_up(rng, cascade.MAX_OVERLAYS)[0]
    )
    assert limits is not None
    assert not limits.distances
    assert cascade.worst_cost(limits) == cascade.MAX_OVERLAYS


@pytest.mark.parametrize("fpr", [0.01, 0.02, 0.05])
def test_the_threshold_half_exceeds_the_threshold_as_often_as_the_order_statistic_allows(fpr: float) -> None:
    rng = np.random.default_rng(1)
    inputs, clean = made_up(rng)
    overlays = made_up(rng, cascade.MAX_OVERLAYS)[0]
    limits = cascade.calibrate(*made_up(rng), inputs, clean, fpr=fpr, answer=softened, overlays=overlays)
    assert limits is not None
    final = []
    for x, score in zip(inputs, clean, strict=True):
        doubtful = score >= limits.grey
        found = cascade.check(x, softened, overlays, limits.strip, squeeze=False).values if doubtful else {}
        final.append(combined(float(score), found, limits))
    assert sum(one > limits.threshold for one in final) == allowed_exceedances(len(final), fpr)


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


def test_a_doubtful_input_is_checked_further_and_the_verdict_says_how(scene: Scene) -> None:
    runner = scene.cascade()
    for x in scene.doubtful:
        found, inferences = runner.infer(x)
        verdict = found.verdict
        assert 1 + 4 + 2 <= inferences <= 1 + cascade.worst_cost(scene.limits)
        assert (verdict.audit, verdict.stages) == ("done", ("one-pass", "strip", "squeezing"))
        assert set(verdict.evidence) == {"strip", "squeezing"}
        assert all(word in verdict.reason for word in ("strip", "squeezing", "as steady as", "together"))


def test_the_evidence_is_what_the_checks_measure(scene: Scene) -> None:
    x = scene.doubtful[0]
    logits = [
        column
        for tap in scene.model.metadata.taps
        if tap.kind == "logit"
        for column in range(tap.offset, tap.offset + tap.channels)
    ]

    def softmax(image: Array) -> Floats:
        powers = np.exp(scene.model.infer(image).features[logits].astype(np.float64))
        return np.asarray(powers / powers.sum())

    expected = cascade.check(x, softmax, scene.sidecar.overlays, scene.limits.strip, squeeze=True)
    found, inferences = scene.cascade().infer(x)
    assert found.verdict.evidence == pytest.approx(expected.values)
    assert inferences == expected.forwards  # its own answer is in both: once before, once as the first pass
    score = combined(scene.model.infer(x).verdict.score, expected.values, scene.limits) / scene.limits.threshold
    assert found.verdict.score == pytest.approx(score)


def test_the_models_own_outputs_and_scores_stay_those_of_the_one_pass(scene: Scene) -> None:
    runner = scene.cascade(audit_share=1.0)
    for x in (*scene.doubtful[:5], *scene.triggered[:5], scene.clear):
        alone, found = scene.model.infer(x), runner.infer(x)[0]
        assert all(np.array_equal(a, b) for a, b in zip(alone.outputs, found.outputs, strict=True))
        assert (found.verdict.predicted, found.verdict.scores) == (alone.verdict.predicted, alone.verdict.scores)


def test_above_the_threshold_no_audit_is_spent(scene: Scene) -> None:
    runner = scene.cascade(audit_share=1.0)
    high = [x for x in scene.triggered if scene.model.infer(x).verdict.score > scene.limits.threshold]
    assert high
    for x in high:
        found, inferences = runner.infer(x)
        assert inferences == 1
        assert (found.verdict.status, found.verdict.audit) == ("flagged", "not needed")


def test_a_doubtful_triggered_input_stands_out_by_its_steady_answer(scene: Scene) -> None:
    one_pass = np.array([scene.model.infer(x).verdict.score for x in scene.triggered])
    lowest = one_pass.argsort()[:100]
    hidden = scene.triggered[lowest]
    level = 1.01 * float(one_pass[lowest].max())  # a threshold that the one pass alone would let all of these under
    runner = scene.cascade(threshold=level)
    verdicts = [runner.infer(x)[0].verdict for x in hidden]
    assert {v.audit for v in verdicts} == {"done"}
    assert np.mean([v.flagged for v in verdicts]) >= 0.9
    # The same steadiness is rare among clean inputs that are doubtful.
    gained = [v.score * level / max(v.scores.values()) for v in verdicts]
    on_clean = [runner.infer(x)[0].verdict for x in scene.doubtful]
    ordinary = [v.score * level / max(v.scores.values()) for v in on_clean]
    assert np.median(gained) > np.quantile(ordinary, 0.9)


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
        runner = scene.cascade(clock, budget=Budget(per_second=1.0, burst=30.0), audit_share=0.1, seed=7)
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
    few = cascade.MAX_OVERLAYS - 1
    return {
        "no sidecar": None,
        "no stages": replace(scene.sidecar, stages={}),
        "stages of another version": replace(scene.sidecar, stages={"strip": (0.25, 2.0)}),
        "no overlays": replace(scene.sidecar, overlays=scene.sidecar.overlays[:0]),
        "fewer overlays than calibrated with": replace(scene.sidecar, overlays=scene.sidecar.overlays[:few]),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no sidecar",
        "no stages",
        "stages of another version",
        "no overlays",
        "fewer overlays than calibrated with",
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
    known = scene.model.infer(scene.clear)
    lost = replace(known, verdict=replace(known.verdict, score=math.nan, scores={"linf": math.nan}))

    def infer(_: Array) -> Inference:
        return lost

    monkeypatch.setattr(scene.model, "infer", infer)
    found, inferences = scene.cascade(audit_share=1.0).infer(scene.clear)
    assert (found.verdict.status, inferences) == ("not checked", 1)


# What conversion puts into the sidecar, and what is promised of the whole.


def test_a_model_with_classes_gets_limits_into_its_sidecar(scene: Scene) -> None:
    assert 0 < scene.limits.grey < scene.limits.threshold
    assert len(scene.limits.entropies) == len(scene.limits.distances) == 60  # a fifth of the fit half's 300
    assert list(scene.limits.score_to_p) == sorted(scene.limits.score_to_p)
    assert min(p for _, p in scene.limits.score_to_p) > 0.0


def test_the_entropies_in_the_sidecar_are_those_of_its_own_overlays(scene: Scene) -> None:
    assert 0.0 <= scene.limits.entropies[0] <= scene.limits.entropies[-1] <= entropy(np.full(10, 0.1))
    assert len(scene.sidecar.overlays) >= cascade.MAX_OVERLAYS


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
