"""The statistics of flag rates: what a rate may be, how much devices differ, and how strongly counts speak against it.

The null hypothesis is composite. The flagged inputs of one device and class are beta-binomial: the device's own rate is
drawn once from a Beta law whose mean is anything up to a bound, and stays. For such counts the likelihood ratio of a
larger mean against the bound is a nonnegative martingale at the bound and a supermartingale below it (both laws are
ordered by likelihood ratio), so that the probability that it ever reaches 1 / alpha is at most alpha, however often
one looks (Ville's inequality). Mixtures over alternatives, products over devices, concave functions such as caps and
weights of at most 1 keep that. Starting anew at each epoch, the expected number of false alarms is at most alpha for
each epoch (Shin, Ramdas and Rinaldo, "E-detectors", 2023).

A few devices are unlike the others without any attack: a camera that looks at one odd thing all week. So a small share
of the devices may report anything at all under the null too (Huber's contamination); how many do is seen at the other
classes.

Bound, dispersion and that share are estimates from the fleet, and the promise holds for what they really are. What
liars can do to them is limited:

* a rate is that of counts winsorised device by device;
* the dispersion is that of highest likelihood where a fifth of the devices report nothing, or anything at all;
* to hide one class among the odd ones, liars must be odd in the others, where fewer of them are left for each.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import betaln, gammaln, logsumexp

Floats = npt.NDArray[np.float64]

CALIBRATION_RISK = 0.01
"""The probability that any bound of a model, widened as :func:`widened` does, lies below the class's true rate."""
_CALIBRATED_AT = 0.05  # what each ``fpr_upper`` was computed for

_REACH = 3.0  # robust standard deviations that one device may lie above what is usual
_ROUNDS = 6
_ODDS = np.array([2.0, 4.0, 8.0, 16.0, 64.0])
"""The alternatives: how many times larger the odds of a flag are than at the bound."""

_DISPERSIONS = np.geomspace(0.01, 4.0, 12)
_USUAL_DISPERSION = 0.25  # where counts say nothing: devices' rates differ by half of themselves
_MOST_CORRELATED = 0.3
_DOUBT = 1.5  # standard deviation of the logarithm of that guess
_LIARS = 0.2
_CELLS = 2000
_USUALLY_ODD = 1e-4  # share of odd devices where counts say nothing; worth half an odd device
_ODD = 0.5


def widened(fpr_upper: Floats) -> Floats:
    """Bounds ``[C]`` that hold for all C classes together with probability 1 - ``CALIBRATION_RISK``.

    Each was computed to hold with 95%: of 43 classes two exceed theirs. By Bonferroni each shall hold with
    1 - risk / C. Where no input of n was flagged the bound is 1 - 0.05^(1/n), which gives n and so the wider one; where
    some were, the same step widens more than is needed.
    """
    power = math.log(CALIBRATION_RISK / max(1, fpr_upper.size)) / math.log(_CALIBRATED_AT)
    return np.asarray(-np.expm1(power * np.log1p(-np.clip(fpr_upper, 0.0, 1.0 - 1e-12))))


def rates(inputs: Floats, flagged: Floats) -> Floats:
    """The usual rate of each class ``[C]`` from counts ``[devices, C]``; 0 where there was no input.

    A device's flagged inputs count up to what is expected and three standard deviations.
    """
    total = np.maximum(inputs.sum(axis=0), 1.0)
    found = flagged.sum(axis=0) / total
    for _ in range(_ROUNDS):
        expected = inputs * found
        found = np.minimum(flagged, expected + _REACH * np.sqrt(expected) + 1.0).sum(axis=0) / total
    return np.asarray(found)


def dispersion(inputs: Floats, flagged: Floats, usual: Floats) -> float:
    """The squared coefficient of variation of devices' rates, from counts ``[devices, C]`` and rates ``[C]``.

    A device raises or lowers its rates by a factor; how much these factors differ is the same for all classes, so that
    all of them are pooled and one under attack moves it little.
    """
    device, label = np.nonzero(inputs * usual > 0.5)
    step = max(1, math.ceil(device.size / _CELLS))
    device, label = device[::step], label[::step]
    n, k, p = inputs[device, label], flagged[device, label], np.clip(usual[label], 1e-6, 0.5)
    choose = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    lie = _LIARS * ((k == 0) + 1.0 / (n + 1.0)) / 2.0  # nothing, or anything
    likelihood = [
        float(np.log((1.0 - _LIARS) * np.exp(choose + _log_likelihood(k, n, p, correlation(each, p))) + lie).sum())
        - (math.log(each / _USUAL_DISPERSION) / _DOUBT) ** 2 / 2
        for each in _DISPERSIONS
    ]
    return float(_DISPERSIONS[int(np.argmax(likelihood))])


def correlation(spread: float, rate: Floats) -> Floats:
    """The intra-class correlation of beta-binomial counts whose rates are ``rate`` times factors of this dispersion."""
    return np.asarray(np.clip(spread * rate / (1.0 - rate), 1e-6, _MOST_CORRELATED))


def odd_share(odd: Floats, devices: Floats) -> Floats:
    """The share of odd devices for each class ``[C]``, by the other classes.

    Args:
        odd: how many devices show an excess in each class, ``[C]``.
        devices: how many reported inputs of it, ``[C]``.
    """
    return np.asarray((odd.sum() - odd + _ODD) / (devices.sum() - devices + _ODD / _USUALLY_ODD))


def log_ratio(inputs: Floats, flagged: Floats, bound: Floats, spread: float) -> Floats:
    """Logarithm of the likelihood ratio ``[K]`` of larger rates, mixed, against those of at most ``bound``, ``[K]``."""
    odds, rho = bound / (1.0 - bound) * _ODDS[:, None], correlation(spread, bound)
    against = _log_likelihood(flagged, inputs, bound, rho)
    mixed = logsumexp(_log_likelihood(flagged, inputs, odds / (1.0 + odds), rho) - against, axis=0)
    return np.asarray(mixed - math.log(len(_ODDS)))


def shares(devices: float) -> Floats:
    """The alternatives for the share of the devices that sees a trigger: from three devices on to half of them."""
    smallest = min(0.5, 3.0 / max(devices, 1.0))
    return np.geomspace(smallest, 0.5, max(1, math.ceil(math.log10(0.5 / smallest)) + 1))


def log_evidence(ratio: Floats, weight: Floats, others: float, *, odd: float, cap: float) -> float:
    """Logarithm of the e-value of one class: do some devices have a larger rate?

    Under the alternative each device is one of these with a probability ``s``: its factor is 1 - s + s * ratio. A
    device that shows nothing costs s, so neither devices that see no trigger nor silent ones outweigh those that do.
    An odd device is no attack: with a share ``odd`` of them the ratio r becomes r / (1 - odd + odd * r), at most
    1 / odd, whose mean is then at most 2 - odd; divided by this it is an e-value.

    Args:
        ratio: logarithms of the likelihood ratios ``[K]`` of the devices that show something.
        weight: what each of them counts, ``[K]``, at most 1.
        others: the weights of all other devices that reported inputs of the class, added up; their ratio counts as 0.
        odd: the share of odd devices, above 0.
        cap: the most that one device may add.
    """
    share = shares(others + ratio.size)[:, None]
    usual = ratio - np.logaddexp(math.log1p(-odd), math.log(odd) + ratio) - math.log(2.0 - odd)
    each = np.logaddexp(np.log1p(-share), np.log(share) + usual)
    total = (weight * np.minimum(each, cap)).sum(axis=1) + others * np.log1p(-share[:, 0])
    return float(logsumexp(total) - math.log(len(share)))


def _log_likelihood(k: Floats, n: Floats, p: Floats, rho: Floats) -> Floats:
    """Of a beta-binomial law, without the binomial coefficient."""
    a, b = p * (1.0 / rho - 1.0), (1.0 - p) * (1.0 / rho - 1.0)
    return np.asarray(betaln(k + a, n - k + b) - betaln(a, b))


__all__ = [
    "CALIBRATION_RISK",
    "correlation",
    "dispersion",
    "log_evidence",
    "log_ratio",
    "odd_share",
    "rates",
    "shares",
    "widened",
]
