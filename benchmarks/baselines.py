"""Published input-level backdoor detectors, implemented from their papers, on the int8 file that a device runs.

They stand beside our own detector in the benchmarks. Each gives an input one number, the higher the more suspicious,
and says how many inferences that took. What a paper leaves to a threshold of its own is left to the benchmark, which
sets every detector's threshold alike. Where a docstring says "Deviates", the reason stands there too.

Rules enforced here:

* a detector is fitted on the fit half of the owner's clean inputs alone (``calibration.halves``): never on test data,
  and never on the inputs that thresholds are set with;
* inputs are run one by one on int8 files, with ``TfliteModel``, as on a device;
* everything random is drawn once, from a fixed seed: the same input gets the same score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from benchmarks import zoo
from converters import calibration, flatbuffer, guard, lowering, sources
from converters.taps import TapPlan
from edgeguard.attacks.base import Images, Progress
from edgeguard.data import Labels
from edgeguard.detection import squeezing, strip
from edgeguard.detection.guarded import TfliteModel, dequantise
from edgeguard.detection.squeezing import SQUEEZERS, Squeezer
from edgeguard.errors import ConfigError, ModelError

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

MIN_A_CLASS = 5
"""Clean inputs that statistics of one class need; a class with fewer gets those of all classes."""

OVERLAYS = 100
FACTORS = (3, 5, 7, 9, 11)
ORDERS = tuple(range(1, 9))
MADS = 10.0
INPUTS_A_CLASS = 30
FOLDS = 5
OMEGA = 1.5
AMPLIFIED_MODELS = 5
MAX_ERROR = 0.6

_ACTIVATION = "activation"
_EVERY_CLASS = -1
_REPORT_EVERY = 50
_VARIANCE_FLOOR = 0.02  # of the mean variance, as in our own statistics: a silent channel must not divide by zero
_MAX_UNCONDITIONAL = 300  # enough for medians, and Gram matrices are large


@dataclass(frozen=True, kw_only=True)
class Scored:
    """``suspicion`` float64 [N], higher is more suspicious; ``forwards`` float64 [N], inferences that each took."""

    suspicion: Floats
    forwards: Floats


class Baseline(Protocol):
    """A detector that is ready to score. ``name`` is what tables call it, ``paper`` where it was published."""

    name: ClassVar[str]
    paper: ClassVar[str]

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """Score images, uint8 [N, H, W, C], one by one.

        Raises:
            ModelError: they do not fit the model.
        """


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What a detector may be fitted with: clean images, uint8 [N, H, W, C], and their true labels [N]."""

    images: Images
    labels: Labels


def baselines(member: zoo.Member, part: zoo.Split, *, names: Sequence[str] | None = None) -> list[Baseline]:
    """The detectors of ``names`` (all of them by default), in that order, fitted for one model.

    Raises:
        ConfigError: a name that no detector has, too few clean inputs, or a network that a method cannot work on.
        ModelError: the model cannot be tapped or lowered.
    """
    wanted = tuple(_FITS) if names is None else tuple(names)
    unknown = [name for name in wanted if name not in _FITS]
    if unknown:
        raise ConfigError("baseline", got=", ".join(unknown), expected=f"some of {', '.join(_FITS)}")
    chosen = calibration.halves(len(part.owner_x), groups=part.owner_groups).fit
    owner = Owner(images=part.owner_x[chosen], labels=part.owner_y[chosen])
    return [_FITS[name](member, owner) for name in wanted]


def _scored(
    name: str, images: Images, score: Callable[[Pixels], tuple[float, int]], progress: Progress | None
) -> Scored:
    _check(images)
    suspicion, forwards = np.empty(len(images)), np.empty(len(images))
    for row, image in enumerate(images):
        if progress is not None and row % _REPORT_EVERY == 0:
            progress(f"scoring with {name}", row, len(images))
        suspicion[row], forwards[row] = score(image)
    return Scored(suspicion=suspicion, forwards=forwards)


def _check(images: Images) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ModelError("images", got=f"{images.dtype}{list(images.shape)}", expected="uint8 [N, H, W, C]")


def _probabilities(model: TfliteModel, image: Pixels) -> Floats:
    """The model's first output [C]; an int8 softmax counts in steps of 1/256."""
    return np.asarray(model.predict(image[np.newaxis])[0], dtype=np.float64)


def _label(model: TfliteModel, image: Pixels) -> int:
    return int(_probabilities(model, image).argmax())


def _members_of(predicted: Labels, label: int) -> npt.NDArray[np.intp]:
    """Which inputs speak for a predicted class: its own, or all where it has too few."""
    own = np.flatnonzero(predicted == label)
    return own if len(own) >= MIN_A_CLASS else np.arange(len(predicted))


# l-infinity norms alone


@dataclass(frozen=True, kw_only=True)
class Linf:
    """The l-infinity norm of each channel; the largest deviation from what is usual for the predicted class.

    Deviates: the paper shows that a trigger moves the l-infinity norms of few channels far and prunes these, with
    triggered inputs at hand; it scores no inputs. This is the plainest score that its observation allows,
    max_c |s_c(x) - mean_c| / std_c, on the taps and norms that our own detector takes.

    ``mean`` and ``std`` are [classes, channels].
    """

    name: ClassVar[str] = "linf"
    paper: ClassVar[str] = "Cheng et al.: Defending against Backdoor Attack on Deep Neural Networks, arXiv 2002.12162"

    content: bytes
    plan: TapPlan
    columns: tuple[int, ...]
    mean: Floats
    std: Floats

    @classmethod
    def fit(cls, member: zoo.Member, owner: Owner) -> Linf:
        """Raises ModelError where nothing can be tapped."""
        bare, plan = calibration.plan(member.int8)
        content = guard.bake_features(bare, plan)
        columns = next(block.columns for block in guard.blocks(guard.layout(plan)) if block.detector == cls.name)
        measured = calibration.measure(content, plan, owner.images)
        mean, std = class_moments(measured.features[:, columns], measured.predicted, plan.classes)
        return cls(content=content, plan=plan, columns=columns, mean=mean, std=std)

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`Baseline`."""
        _check(images)
        measured = calibration.measure(self.content, self.plan, images, progress)
        z = (measured.features[:, self.columns] - self.mean[measured.predicted]) / self.std[measured.predicted]
        return Scored(suspicion=np.abs(z).max(axis=1), forwards=np.ones(len(images)))


def class_moments(features: Floats, predicted: Labels, classes: int) -> tuple[Floats, Floats]:
    """Mean and standard deviation [classes, D] of features [N, D], by predicted class [N]."""
    groups = [features[_members_of(predicted, label)] for label in range(classes)]
    mean, variance = np.stack([g.mean(axis=0) for g in groups]), np.stack([g.var(axis=0) for g in groups])
    floor = max(_VARIANCE_FLOOR * float(variance.mean()), 1e-12)
    return mean, np.sqrt(np.maximum(variance, floor))


# STRIP


@dataclass(frozen=True, kw_only=True)
class Strip:
    """STRIP with 100 overlays and without our sequential test: minus the mean entropy of the superimposed inputs.

    Deviates: every input gets the same overlays, drawn once, as a device would hold them; the authors draw anew.
    """

    name: ClassVar[str] = "strip-100"
    paper: ClassVar[str] = "Gao et al.: STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019"

    model: TfliteModel
    overlays: Images

    @classmethod
    def fit(cls, member: zoo.Member, owner: Owner) -> Strip:
        """Raises ConfigError for fewer clean inputs than overlays."""
        count = len(owner.images)
        if count < OVERLAYS:
            raise ConfigError(f"baseline {cls.name}", got=f"{count} clean inputs", expected=f"at least {OVERLAYS}")
        chosen = np.random.default_rng(0).choice(count, OVERLAYS, replace=False)
        return cls(model=TfliteModel(member.int8), overlays=owner.images[chosen])

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`Baseline`."""

        def score(image: Pixels) -> tuple[float, int]:
            result = strip.strip(image, self.overlays, lambda x: _probabilities(self.model, x))
            return -result.entropy, result.forwards

        return _scored(self.name, images, score, progress)


# feature squeezing


@dataclass(frozen=True, kw_only=True)
class Squeezing:
    """Feature squeezing: the largest l1 distance of the probabilities before and after a squeezer. One-tailed.

    Squeezers as in the paper's best joint sets: 1 bit and a 2x2 median for grey images (MNIST), 5 bits and a 2x2 median
    for colour (CIFAR-10).

    Deviates: the colour set's third squeezer, non-local means, needs an image library that the project does not have,
    and is left out.
    """

    name: ClassVar[str] = "squeezing"
    paper: ClassVar[str] = (
        "Xu, Evans, Qi: Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks, NDSS 2018"
    )

    model: TfliteModel
    squeezers: Mapping[str, Squeezer]

    @classmethod
    def fit(cls, member: zoo.Member, owner: Owner) -> Squeezing:
        """The clean inputs only tell grey from colour: a threshold is all that the method fits."""
        depth = "1-bit" if owner.images.shape[-1] == 1 else "5-bit"
        return cls(model=TfliteModel(member.int8), squeezers={name: SQUEEZERS[name] for name in (depth, "median 2x2")})

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`Baseline`."""

        def score(image: Pixels) -> tuple[float, int]:
            found = squeezing.distances(image, lambda x: _probabilities(self.model, x), self.squeezers)
            return max(found.values()), 1 + len(found)

        return _scored(self.name, images, score, progress)


# SCALE-UP


@dataclass(frozen=True, kw_only=True)
class ScaleUp:
    """SCALE-UP, data-free: the share of brightened copies, n times the pixels, that keep the input's label.

    SPC(x) = 1/|S| sum_{n in S} [argmax f(clip(n x)) = argmax f(x)], S = {3, 5, 7, 9, 11}: six values, so many ties.
    """

    name: ClassVar[str] = "scale-up"
    paper: ClassVar[str] = (
        "Guo et al.: SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled Prediction "
        "Consistency, ICLR 2023"
    )

    model: TfliteModel

    @classmethod
    def fit(cls, member: zoo.Member, owner: Owner) -> ScaleUp:
        """Needs no clean input."""
        del owner
        return cls(model=TfliteModel(member.int8))

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`Baseline`."""
        return _scored(
            self.name,
            images,
            lambda image: (scaled_consistency(image, lambda x: _label(self.model, x)), 1 + len(FACTORS)),
            progress,
        )


def scaled_consistency(image: Pixels, label: Callable[[Pixels], int], factors: Sequence[int] = FACTORS) -> float:
    """The share, 0 to 1, of ``clip(n * image, 0, 255)`` over the factors n that get the image's own label."""
    own = label(image)
    copies = (np.clip(image.astype(np.int64) * n, 0, 255).astype(np.uint8) for n in factors)
    return sum(label(copy) == own for copy in copies) / len(factors)


# Beatrix


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What is usual for Gram entries: median less and plus 10 MAD, both [orders, C (C + 1) / 2].

    ``floor``: a deviation is relative to its bound, and to no less than this.
    """

    low: Floats
    high: Floats
    floor: float


@dataclass(frozen=True, kw_only=True)
class Beatrix:
    """Gram matrices of the last convolution's activation: how far they leave what is usual for the predicted class.

    Deviates, so that small int8 networks, most of whose Gram entries are exactly 0 on clean inputs, do it no injustice:

    * a bound is divided by no less than the median positive entry, instead of 1e-6, by which silent channels would be
      all that counts;
    * the paper flags what exceeds a clean quantile of the class, from five-fold cross-validation. One number for all
      classes is the deviation over such a quantile; here the median, because 30 inputs tell little about the 95%
      quantile, and at least the median of all classes', because it is 0 where no clean input leaves the bounds;
    * the paper takes one layer of each of its own networks; here it is the deepest activation with positions that our
      tap planner finds. Its second stage, which names the target class from many inputs, is none for a single input.

    On seven attacks on digits the mean AUROC was 0.93 so, and 0.85 with 1e-6 and no quantile.
    """

    name: ClassVar[str] = "beatrix"
    paper: ClassVar[str] = "Ma et al.: The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices, NDSS'23"

    model: TfliteModel
    bounds: tuple[Bounds, ...]
    scales: Floats

    @classmethod
    def fit(cls, member: zoo.Member, owner: Owner) -> Beatrix:
        """Raises ModelError where nothing can be tapped."""
        model = TfliteModel(with_activation(member.int8))
        predicted = np.asarray([_activation(model, image)[0] for image in owner.images], dtype=np.int64)
        rng = np.random.default_rng(0)
        fitted: dict[int, tuple[Bounds, float]] = {}
        labels = range(int(model.outputs[0]["shape"][-1]))
        keys = [label if np.sum(predicted == label) >= MIN_A_CLASS else _EVERY_CLASS for label in labels]
        for key in dict.fromkeys(keys):
            members = rng.permutation(_members_of(predicted, key))
            chosen = members[: _MAX_UNCONDITIONAL if key == _EVERY_CLASS else INPUTS_A_CLASS]
            grams = np.stack([gram_matrices(_activation(model, owner.images[index])[1]) for index in chosen])
            fitted[key] = usual(grams), clean_deviation(grams)
        scales = np.asarray([fitted[key][1] for key in keys])
        usual_scale = max(float(np.median(scales)), 1e-12)
        bounds = tuple(fitted[key][0] for key in keys)
        return cls(model=model, bounds=bounds, scales=np.maximum(scales, usual_scale))

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`Baseline`."""

        def score(image: Pixels) -> tuple[float, int]:
            label, activation = _activation(self.model, image)
            return deviation(gram_matrices(activation), self.bounds[label]) / float(self.scales[label]), 1

        return _scored(self.name, images, score, progress)


def with_activation(content: bytes) -> bytes:
    """A file with its deepest activation that has positions (any, where none has) as one more output.

    Raises:
        ModelError: damaged, or nothing in it can be tapped.
    """
    bare, plan = calibration.plan(content, count=1)
    tap = ([tap for tap in plan.taps if tap.axes] or list(plan.taps))[-1]
    model = flatbuffer.parse(bare)
    graph = model.subgraphs[0]
    graph.outputs = np.append(graph.outputs, np.int32(tap.tensor)).astype(np.int32)
    for signature in model.signatureDefs:
        signature.outputs.append(schema.TensorMapT(name=_ACTIVATION, tensorIndex=tap.tensor))
    return flatbuffer.pack(model)


def _activation(model: TfliteModel, image: Pixels) -> tuple[int, Floats]:
    """The predicted class, and the activation [positions, C] in real numbers."""
    outputs = model.invoke(model.quantise(image))
    real = dequantise(outputs[-1][0], model.outputs[-1])
    return int(outputs[0][0].argmax()), real.reshape(-1, real.shape[-1]).astype(np.float64)


def gram_matrices(activation: Floats, orders: Sequence[int] = ORDERS) -> Floats:
    """G^p = (F^p F^pT)^(1/p) of an activation F [positions, C], upper triangles: [orders, C (C + 1) / 2].

    Powers are of each number alone; a negative entry keeps its sign.
    """
    upper = np.triu_indices(activation.shape[1])
    rows = []
    for order in orders:
        powered = activation**order
        entries = (powered.T @ powered)[upper]
        rows.append(np.sign(entries) * np.abs(entries) ** (1.0 / order))
    return np.stack(rows)


def usual(grams: Floats) -> Bounds:
    """The bounds of clean inputs' Gram entries [N, orders, entries]."""
    median = np.median(grams, axis=0)
    spread = MADS * np.median(np.abs(grams - median), axis=0)
    positive = grams[grams > 0]
    floor = float(np.median(positive)) if positive.size else 1e-6
    return Bounds(low=median - spread, high=median + spread, floor=floor)


def deviation(gram: Floats, bounds: Bounds) -> float:
    """The mean over orders and entries of how far a Gram entry is outside its bounds, relative to the bound."""
    below = np.maximum(bounds.low - gram, 0.0) / np.maximum(np.abs(bounds.low), bounds.floor)
    above = np.maximum(gram - bounds.high, 0.0) / np.maximum(np.abs(bounds.high), bounds.floor)
    return float((below + above).mean())


def clean_deviation(grams: Floats) -> float:
    """The median deviation of clean inputs [N, orders, entries], each from bounds that its fold had no part in."""
    folds = np.arange(len(grams)) % FOLDS
    found: list[float] = []
    for fold in range(FOLDS):
        bounds = usual(grams[folds != fold])
        found += [deviation(gram, bounds) for gram in grams[folds == fold]]
    return float(np.median(found))


# IBD-PSC


@dataclass(frozen=True, kw_only=True)
class IbdPsc:
    """IBD-PSC: the mean confidence in the input's label over models whose last batch-norms are amplified.

    PSC(x) = 1/n sum_{i=k}^{k+n-1} F_i(x)_y with y the unamplified model's label, and F_i the model whose last i
    batch-norms have gamma and beta times omega = 1.5; n = 5. k is the smallest i at which F_i errs on more than 60% of
    the owner's clean inputs, or all L batch-norms where none does.

    Deviates: where fewer than five models are left from k to L, the mean is over these. k is found on the float models,
    as lowering each takes long, with up to 500 inputs instead of 100; each F_i is quantised with the owner's inputs.

    Made for networks of some 20 batch-norms. One of three or four shrugs amplification off: on digits the clean error
    never reached 60% (1% for BadNets, 19% for Blended, all of it amplified), with no omega up to 32. Then k = L, and
    the score says little.

    ``depths`` are the numbers i; ``errors`` [L] what was measured on the way to k, NaN beyond.
    """

    name: ClassVar[str] = "ibd-psc"
    paper: ClassVar[str] = (
        "Hou et al.: IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency, ICML 2024"
    )

    model: TfliteModel
    amplified: tuple[TfliteModel, ...]
    depths: tuple[int, ...]
    errors: Floats

    @classmethod
    def fit(cls, member: zoo.Member, owner: Owner) -> IbdPsc:
        """Raises ConfigError for a network without batch-norm."""
        network = member.keras()
        layers = batch_norms(network)
        if not layers:
            raise ConfigError(
                f"baseline {cls.name}", got=f"{member.cell.name} without batch-norm", expected="one with it"
            )
        ranges = owner.images[: lowering.MAX_RANGE_INPUTS]
        labels = owner.labels[: len(ranges)]
        errors = np.full(len(layers), np.nan)

        def error(depth: int) -> float:
            with scaled(layers[-depth:], OMEGA):
                answers = network.predict(ranges.astype(np.float32), batch_size=256, verbose=0)
            errors[depth - 1] = np.mean(answers.argmax(axis=1) != labels)
            return float(errors[depth - 1])

        start = start_depth(error, len(layers))
        depths = tuple(range(start, min(start + AMPLIFIED_MODELS, len(layers) + 1)))
        amplified = tuple(_lowered(network, layers[-depth:], ranges) for depth in depths)
        return cls(model=TfliteModel(member.int8), amplified=amplified, depths=depths, errors=errors)

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`Baseline`."""

        def score(image: Pixels) -> tuple[float, int]:
            label = _label(self.model, image)
            confidences = [float(_probabilities(model, image)[label]) for model in self.amplified]
            return float(np.mean(confidences)), 1 + len(confidences)

        return _scored(self.name, images, score, progress)


def start_depth(error: Callable[[int], float], layers: int, *, limit: float = MAX_ERROR) -> int:
    """The smallest depth, 1 to ``layers``, at which the clean error exceeds the limit; ``layers`` where none does."""
    return next((depth for depth in range(1, layers + 1) if error(depth) > limit), layers)


def batch_norms(network: Any) -> list[Any]:
    """A Keras model's batch-norms that have both gamma and beta, from input to output, nested models included."""
    import keras

    found: list[Any] = []
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            found += batch_norms(layer)
        elif isinstance(layer, keras.layers.BatchNormalization) and layer.scale and layer.center:
            found.append(layer)
    return found


@contextmanager
def scaled(layers: Sequence[Any], omega: float) -> Iterator[None]:
    """Batch-norms with gamma and beta times ``omega``; exactly what they were again afterwards."""
    variables = [variable for layer in layers for variable in (layer.gamma, layer.beta)]
    before = [variable.numpy().copy() for variable in variables]
    try:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value * np.float32(omega))
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _lowered(network: Any, layers: Sequence[Any], ranges: Images) -> TfliteModel:
    with scaled(layers, OMEGA):
        content = lowering.lower(sources.of_keras(network, f"amplified-{len(layers)}"), ranges).int8_tflite
    assert content is not None
    return TfliteModel(content)


_FITS: Mapping[str, Callable[[zoo.Member, Owner], Baseline]] = MappingProxyType(
    {fitted.name: fitted.fit for fitted in (Linf, Strip, Squeezing, ScaleUp, Beatrix, IbdPsc)}
)
NAMES = tuple(_FITS)
"""Of every detector."""
