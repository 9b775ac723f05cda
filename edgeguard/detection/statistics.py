"""Clean statistics of the feature norms, and the scores and thresholds that follow from them. NumPy only.

Each detector looks at its own block of features x: one norm of the taps that have it, and the model's logits. Clean
features are modelled as a Gaussian around what the model's answer lets expect, with a covariance in factor-analysis
form:

    m(x) = sum_c p_c(x) m_c,  p = softmax(logits)            diag(psi) + L L^T, k factors

An input that the model takes half for a shirt and half for a coat is compared with something between the two; the
usual mean of the predicted class alone would call it odd. The logits are in the block because a trigger lifts one
beyond what the activations before it explain. With M such that M^T M = psi^-1 L (I + L^T psi^-1 L)^-1 L^T psi^-1
(Woodbury),

    raw(x) = sum_d (x_d - m_d)^2 / psi_d  -  sum_j (M (x - m))_j^2        (squared Mahalanobis distance)

so that a graph needs one product each for expectation, factors and weighted sum. The covariance is that around means
which the input's own group had no part in. A score is raw / threshold. The two
large matrices, M and that of the classes' m_c, hold whole multiples of 1/127 in units of their own: a file can store
them in a byte each. What rounding leaves of the m_c is in the covariance too; rounded rows of M count a little less,
so that the distance stays one.

Rules enforced here:

* the fit half and the threshold half are disjoint;
* the threshold is the order statistic of the threshold half for which the false-positive rate exceeds 1.5 times the
  rate asked for with a probability of at most 5% (Beta law of order statistics); where none exists, refuse and say how
  many inputs are needed. Of inputs in groups, such as frames of one video, fewer may exceed it;
* detectors are brought to one common tail before the joint threshold is set on their maximum; the tails come from the
  fit half, because the Beta law holds for one threshold that was chosen on the threshold half, not for several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeguard.errors import ModelError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLACK = 1.5
CONFIDENCE = 0.95
MAX_FACTORS = 12
STEPS = 127  # of the two matrices that are stored in a byte an entry
_INPUTS_PER_FACTOR = 40  # with fewer, factors fit the noise of the fit half
_FACTOR_ROUNDS = 20
_FOLDS = 10  # of groups, one left out at a time
_MEAN_PRIOR = 0.5  # pseudo-inputs that pull a class mean towards the mean of all
_VARIANCE_FLOOR = 0.05  # of a part's mean variance: a channel that is silent on clean data must not divide by zero
_UNIQUE_FLOOR = 0.02  # of the mean variance: what factors do not explain of a column
_P_POINTS = 32


@dataclass(frozen=True, kw_only=True)
class Block:
    """The features that one detector looks at: its name and their indices in the feature vector, by activation.

    Numbers of one part are alike; those of two parts, such as norms and logits, may differ in scale by orders.
    ``stretch``: how much further than the others' its clean tail is to lie below the threshold, 1 for as far.
    ``factors``: at most so many; as many as :func:`fit` allows where it is None.
    """

    detector: str
    parts: tuple[tuple[int, ...], ...]
    stretch: float = 1.0
    factors: int | None = None

    @property
    def columns(self) -> tuple[int, ...]:
        """All indices."""
        return tuple(column for part in self.parts for column in part)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is compiled into the graph. K is the number of factors over all detectors, D the number of features.

    ``logits``: the features that hold the classes' logits, C of them; none for a model without classes. ``unit`` [D]:
    what features are divided by; ``centre`` [D], their mean, ``table`` [C, D], what is expected of each class beyond
    it (one row without classes), and ``projection`` [K, D] are in these units; ``weights`` [detectors, D + K].

        deviation = features / unit - centre - softmax(logits) @ table
        raw = (deviation, projection @ deviation)^2 @ weights.T, kept at 0 or above

    ``table`` and ``projection`` hold whole multiples of 1 / ``STEPS`` from -1 to 1.
    """

    detectors: tuple[str, ...]
    logits: tuple[int, ...]
    unit: Floats
    centre: Floats
    table: Floats
    projection: Floats
    weights: Floats


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Raw score per detector at which the joint decision flags, and what was measured while setting them."""

    thresholds: tuple[float, ...]
    fpr_upper: tuple[float, ...]
    score_to_p: tuple[tuple[float, float], ...]


def fit(
    features: Floats,
    blocks: Sequence[Block],
    logits: Sequence[int] = (),
    *,
    max_factors: int = MAX_FACTORS,
    groups: Ints | None = None,
) -> Statistics:
    """Fit the expected features and the factor-analysis covariance around them on clean features.

    Args:
        features: [N, D], of clean inputs.
        blocks: one per detector.
        logits: which features are the classes' logits; none for a model without classes.
        max_factors: of each detector.
        groups: which inputs [N] belong together.

    Raises:
        ModelError: too few inputs, or features that are not finite.
    """
    count, width = features.shape
    if count < 2 * len(blocks) or not np.isfinite(features).all():
        got = f"{int((~np.isfinite(features)).any(axis=1).sum())} of {count} inputs with features that are not finite"
        raise ModelError("calibration features", got=got, expected=f"at least {2 * len(blocks)} inputs, all finite")
    answers = shares(features, logits)
    expected = _expectations(features, answers)
    overall = features.mean(axis=0)
    unseen = features - _expected_by_others(features, answers, groups)
    deviation = _floored(unseen, blocks)
    unit = np.maximum(deviation, np.abs(expected - overall).max(axis=0))
    centre, exact = overall / unit, (expected - overall) / unit
    table = _rounded(exact)
    residuals = unseen / unit + answers @ (exact - table)
    weights = np.zeros((len(blocks), width))
    projections: list[Floats] = []
    factor_weights: list[Floats] = []
    for row, block in enumerate(blocks):
        columns = np.asarray(block.columns)
        scale = (deviation / unit)[columns]
        standard = residuals[:, columns] / scale
        most = max_factors if block.factors is None else min(max_factors, block.factors)
        factors = max(0, min(most, len(columns) // 4, count // _INPUTS_PER_FACTOR))
        covariance = standard.T @ standard / count
        # A channel below the floor counts as if its variance were the floor's: else the few clean inputs that wake a
        # dormant channel score a hundred times the median, and the threshold has to follow.
        covariance += np.diag(np.maximum(1.0 - np.diag(covariance), 0.0))
        psi, whitened = factor_analysis(covariance, factors)
        weights[row, columns] = 1.0 / (psi * scale**2)
        projection = np.zeros((len(whitened), width))
        projection[:, columns] = whitened / scale
        largest = np.maximum(np.abs(projection).max(axis=1, initial=0.0), 1e-12)
        projections.append(_rounded(projection / largest[:, np.newaxis]))
        each = np.zeros((len(blocks), len(whitened)))
        each[row] = -_factor_weights(whitened * np.sqrt(psi), projections[-1][:, columns] * scale * np.sqrt(psi))
        factor_weights.append(each)
    return Statistics(
        detectors=tuple(block.detector for block in blocks),
        logits=tuple(logits),
        unit=unit,
        centre=centre,
        table=table,
        projection=np.concatenate(projections),
        weights=np.concatenate([weights, *factor_weights], axis=1),
    )


def _factor_weights(exact: Floats, rounded: Floats) -> Floats:
    """How much each rounded factor [k, D] counts, so that no deviation lowers a score, as none did before rounding.

    Both in units in which the distance is |d|^2 - sum_j w_j (r_j d)^2, and w_j = 1 for the exact factors. It is never
    negative where the largest eigenvalue of sum_j w_j r_j r_j^T is below 1; it is brought to that of the exact ones.
    """
    if not len(exact):
        return np.zeros(0)
    weights = (exact**2).sum(axis=1) / np.maximum((rounded**2).sum(axis=1), 1e-12)
    root = np.sqrt(weights)[:, np.newaxis]
    found, wanted = (float(np.linalg.eigvalsh(a @ a.T)[-1]) for a in (root * rounded, exact))
    return np.asarray(weights * min(1.0, wanted / max(found, 1e-12)))


def _rounded(values: Floats) -> Floats:
    return np.asarray(np.round(values * STEPS) / STEPS)


def shares(features: Floats, logits: Sequence[int]) -> Floats:
    """How much of an input the model gives to each class [N, C]: the softmax; all to the one row without classes."""
    if not len(logits):
        return np.ones((len(features), 1))
    scores = features[:, list(logits)]
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _expectations(features: Floats, answers: Floats) -> Floats:
    """The features expected of each class [C, D]: least squares on the answers [N, C], drawn to the mean of all.

    Where every answer is sure of its class, these are the class means.
    """
    overall = features.mean(axis=0)
    normal = answers.T @ answers + _MEAN_PRIOR * np.eye(answers.shape[1])
    return np.asarray(np.linalg.solve(normal, answers.T @ features + _MEAN_PRIOR * overall))


def _expected_by_others(features: Floats, answers: Floats, groups: Ints | None) -> Floats:
    """The features expected of each input [N, D] by what other groups' inputs show.

    An input lies closer to a mean that it is part of than a fresh one does, and so do all of its group: with a few
    tracks a class, the covariance around such means knows nothing of how tracks differ. Where no other group shows the
    class, or one group is most of all, the mean of all inputs must do.
    """
    expected = answers @ _expectations(features, answers)
    number = np.arange(len(features)) if groups is None else np.unique(groups, return_inverse=True)[1]
    folds = np.random.default_rng(0).permutation(int(number.max()) + 1)[number] % _FOLDS
    likeliest = answers.argmax(axis=1)
    for fold in np.unique(folds):
        others = folds != fold
        if others.sum() < len(features) / 2:
            continue
        known = answers[others].sum(axis=0) >= 1.0
        held = np.flatnonzero(~others & known[likeliest])
        if len(held):
            expected[held] = answers[held] @ _expectations(features[others], answers[others])
    return np.asarray(expected)


def _floored(residuals: Floats, blocks: Sequence[Block]) -> Floats:
    """Standard deviation of each column [N, D], floored by that of the part it belongs to."""
    variance = (residuals**2).mean(axis=0)
    floored = variance.copy()
    for part in {part for block in blocks for part in block.parts}:
        columns = list(part)
        least = max(_VARIANCE_FLOOR * float(variance[columns].mean()), 1e-12)
        floored[columns] = np.maximum(variance[columns], least)
    return np.asarray(np.sqrt(np.maximum(floored, 1e-12)))


def factor_analysis(covariance: Floats, factors: int) -> tuple[Floats, Floats]:
    """Principal-factor solution of covariance = diag(psi) + L L^T.

    Returns:
        psi [D], and M [k, D] with M^T M = psi^-1 L (I + L^T psi^-1 L)^-1 L^T psi^-1.
    """
    variance = np.diag(covariance).copy()
    least = max(_UNIQUE_FLOOR * float(variance.mean()), 1e-12)
    psi = np.maximum(variance, least)
    if factors == 0:
        return psi, np.zeros((0, len(psi)))
    padded = covariance + np.diag(np.maximum(least - variance, 0.0))
    vectors = np.zeros((len(psi), factors))
    excess = np.zeros(factors)
    for _ in range(_FACTOR_ROUNDS):
        scale = np.sqrt(psi)
        values, all_vectors = np.linalg.eigh(padded / np.outer(scale, scale))
        vectors = all_vectors[:, ::-1][:, :factors]
        excess = np.maximum(values[::-1][:factors] - 1.0, 0.0)
        loadings = scale[:, np.newaxis] * vectors * np.sqrt(excess)
        psi = np.maximum(np.diag(padded) - (loadings**2).sum(axis=1), least)
    # One more decomposition, so that factors and psi belong together: in whitened space L = U sqrt(e) with
    # orthonormal U, hence L (I + L^T L)^-1 L^T = U diag(e / (1 + e)) U^T.
    scale = np.sqrt(psi)
    values, all_vectors = np.linalg.eigh(padded / np.outer(scale, scale))
    vectors = all_vectors[:, ::-1][:, :factors]
    excess = np.maximum(values[::-1][:factors] - 1.0, 0.0)
    whitened = (vectors * np.sqrt(excess / (1.0 + excess))).T / scale
    return psi, whitened


def raw_scores(statistics: Statistics, features: Floats) -> Floats:
    """Raw scores [N, detectors], at least 0, of features [N, D]."""
    expected = statistics.centre + shares(features, statistics.logits) @ statistics.table
    deviations = features / statistics.unit - expected
    extended = np.concatenate([deviations, deviations @ statistics.projection.T], axis=1)
    return np.maximum(extended**2 @ statistics.weights.T, 0.0)


def tails(raw: Floats, fpr: float) -> Floats:
    """Where the tail of each detector begins [detectors], from raw scores [N, detectors] of the *fit* half.

    Raises:
        ModelError: a detector whose scores do not vary.
    """
    scale: Floats = np.quantile(raw, 1.0 - fpr, axis=0)
    if not np.isfinite(scale).all() or scale.min() <= 0.0:
        raise ModelError(
            "calibration features",
            got="tapped activations that do not vary",
            expected="inputs that move them",
            do="check the range of the data, or choose other taps (--taps)",
        )
    return scale


def set_thresholds(
    raw: Floats, predicted: Ints, classes: int, fpr: float, *, scale: Floats, groups: Ints | None = None
) -> Thresholds:
    """Thresholds from raw scores [N, detectors] of clean inputs that the statistics were *not* fitted on.

    Args:
        raw: of the threshold half.
        predicted: classes [N] of the same inputs.
        classes: number of classes.
        fpr: the false-positive rate asked of the joint decision.
        scale: as :func:`tails` returned it, times what each detector is stretched by.
        groups: which of them [N] belong together; see :func:`worth`.

    Raises:
        ModelError: too few inputs for the false-positive rate asked for; the message says how many are needed.
    """
    joint = (raw / scale).max(axis=1)
    allowed = allowed_of(joint, fpr, groups)
    if allowed is None:
        independent = "" if groups is None else f", worth {worth(joint, fpr, groups)} independent ones"
        raise ModelError(
            "calibration set",
            got=f"{len(raw)} inputs in the threshold half{independent}",
            expected=f"at least {inputs_needed(fpr)} for a false-positive rate of {fpr:g}",
            do=f"bring at least {2 * inputs_needed(fpr)} clean inputs"
            f"{'' if groups is None else ', from more groups,'} or raise --fpr",
        )
    level = threshold_of(joint, allowed)
    joint = joint / level
    flagged = joint > 1.0
    uppers = [
        rate_upper(int(flagged[predicted == label].sum()), int((predicted == label).sum())) for label in range(classes)
    ]
    return Thresholds(
        thresholds=tuple(float(t) for t in scale * level), fpr_upper=tuple(uppers), score_to_p=p_table(joint)
    )


def threshold_of(joint: Floats, allowed: int) -> float:
    """The level that ``allowed`` of the joint scores [N] exceed, always above 0."""
    # The smallest step up makes "exceeds 1" exclude the order statistic itself, also after rounding to float32.
    return max(float(-np.sort(-joint)[allowed]), 1e-6) * (1.0 + 1e-5)


def p_table(joint: Floats) -> tuple[tuple[float, float], ...]:
    """Pairs (score, share of the joint scores [N] at or above it), ascending in score, denser in the tail."""
    count = len(joint)
    points = np.unique(np.quantile(joint, 1.0 - np.geomspace(1.0, 1.0 / count, _P_POINTS)))
    return tuple((float(p), float((np.sum(joint >= p) + 1) / (count + 1))) for p in points)


def allowed_of(joint: Floats, fpr: float, groups: Ints | None = None) -> int | None:
    """How many of these clean joint scores [N] may lie above the threshold; None where even 0 is too many.

    Dependent inputs allow the share that as many independent ones as they are worth would.
    """
    if groups is None:
        return allowed_exceedances(len(joint), fpr)
    independent = worth(joint, fpr, groups)
    allowed = allowed_exceedances(independent, fpr)
    return None if allowed is None else allowed * len(joint) // independent


def worth(joint: Floats, fpr: float, groups: Ints) -> int:
    """How many independent inputs these joint scores [N] are worth, of inputs of which those of one group are alike.

    N over the design effect 1 + (m - 1) rho (Kish: Survey Sampling, 1965), with m the mean size of the group that an
    input is in, and rho the intraclass correlation, by analysis of variance, of whether a score is among the highest
    share ``fpr``.
    """
    high = (joint > np.quantile(joint, 1.0 - fpr)).astype(np.float64)
    member = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(member)
    count, many = len(joint), len(sizes)
    if many == count:
        return count
    mean_size = float((sizes**2).sum()) / count
    if many < 2:
        return 1
    means = np.bincount(member, high) / sizes
    between = float((sizes * (means - high.mean()) ** 2).sum()) / (many - 1)
    within = float(((high - means[member]) ** 2).sum()) / (count - many)
    usual = (count - mean_size) / (many - 1)
    spread = between + (usual - 1.0) * within
    rho = min(1.0, max(0.0, (between - within) / spread)) if spread > 0 else 0.0
    return max(1, int(count / (1.0 + (mean_size - 1.0) * rho)))


def allowed_exceedances(count: int, fpr: float) -> int | None:
    """How many of ``count`` clean scores may lie above the threshold; None where even 0 is too many.

    With r of n above, the false-positive rate is Beta(r + 1, n - r); P(it exceeds 1.5 fpr) = P(Binomial(n, 1.5 fpr)
    <= r), which must be at most 5%.
    """
    best = None
    for above in range(count):
        if binomial_cdf(above, count, min(SLACK * fpr, 1.0)) > 1.0 - CONFIDENCE:
            break
        best = above
    return best


def inputs_needed(fpr: float) -> int:
    """The smallest threshold half that can hold the false-positive rate: 199 for 1%."""
    return math.ceil(math.log(1.0 - CONFIDENCE) / math.log1p(-min(SLACK * fpr, 1.0 - 1e-12)))


def rate_upper(flagged: int, count: int) -> float:
    """Upper 95% bound (Clopper and Pearson, one-sided) of a rate of which ``flagged`` of ``count`` were seen."""
    if count == 0 or flagged >= count:
        return 1.0
    low, high = flagged / count, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if binomial_cdf(flagged, count, middle) > 1.0 - CONFIDENCE:
            low = middle
        else:
            high = middle
    return high


def binomial_cdf(successes: int, count: int, rate: float) -> float:
    """P(Binomial(count, rate) <= successes), by summing in logarithms."""
    if successes >= count or rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return 0.0
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    total = 0.0
    for k in range(successes + 1):
        log_choose = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        total += math.exp(log_choose + k * log_rate + (count - k) * log_rest)
    return min(total, 1.0)
