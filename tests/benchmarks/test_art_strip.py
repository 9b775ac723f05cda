"""The comparison with the Adversarial Robustness Toolbox: what is measured how, without the toolbox itself.

A stand-in for the toolbox has the names, the calls and the order of steps that the worker relies on.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import entropy

from benchmarks import art_strip
from benchmarks.art_strip import Detector, Outcome
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ConfigError
from tests.simulators.attacked import Attacked

Pixels = npt.NDArray[np.uint8]

TOOLBOX = {
    "__init__": "__version__ = '0'",
    "estimators/__init__": "",
    "estimators/classification": """
class BlackBoxClassifier:
    def __init__(self, predict_fn, input_shape, nb_classes):
        self.nb_classes = nb_classes
""",
    "estimators/poison_mitigation/__init__": "",
    "estimators/poison_mitigation/strip/__init__": "",
    "estimators/poison_mitigation/strip/strip": """
import numpy as np

def entropy(pk, base, axis):
    shares = pk / pk.sum(axis=axis, keepdims=True)
    return -(shares * np.log2(np.where(shares > 0, shares, 1)) / np.log2(base)).sum(axis=axis)

class Mitigated:
    def predict(self, x):
        answers = self.asked(x)
        for row, one in enumerate(x):
            drawn = self.overlays[np.random.choice(len(self.overlays), self.num_samples)]
            mean = np.sum(entropy(self.asked(one / 2 + drawn / 2), base=2, axis=0)) / self.num_samples
            if mean <= self.entropy_threshold:
                answers[row] = 0
        return answers

    def mitigate(self, x):
        self.overlays, self.entropy_threshold = x, -np.inf
        total = sum(np.sum(entropy(self.asked(one / 2 + x[: self.num_samples] / 2), base=2, axis=0)) for one in x)
        if not np.isfinite(total):
            raise ValueError("not finite")
        self.entropy_threshold = total / self.num_samples / len(x)
""",
    "defences/__init__": "",
    "defences/transformer/__init__": "",
    "defences/transformer/poisoning": """
from art.estimators.poison_mitigation.strip.strip import Mitigated

class STRIP:
    def __init__(self, classifier):
        self.classifier = classifier

    def __call__(self, num_samples, false_acceptance_rate):
        made, base = self.classifier, type(self.classifier)
        settings = {"num_samples": num_samples, "asked": staticmethod(made.predict)}
        made.__class__ = type("Made", (Mitigated, base), settings)
        return made
""",
}


@pytest.fixture
def toolbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the toolbox, found by every new interpreter."""
    for name, text in TOOLBOX.items():
        path = tmp_path / "art" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture(scope="module")
def content(attacked: Attacked) -> bytes:
    return attacked.conversion.bare


@pytest.fixture(scope="module")
def owner(attacked: Attacked) -> Pixels:
    return attacked.x_owner[:60]


@pytest.fixture(scope="module")
def inputs(attacked: Attacked) -> dict[str, Pixels]:
    clean = attacked.data.x_test[attacked.data.y_test != attacked.attack.target][:12].astype(np.uint8)
    return {"clean": clean, "triggered": attacked.attack.stamp(clean)}


def outcome(*suspicion: float, flagged: bool = False) -> Outcome:
    count = len(suspicion)
    return Outcome(suspicion=np.asarray(suspicion), flagged=np.full(count, flagged), forwards=np.full(count, 21.0))


def test_the_worker_needs_numpy_art_and_a_runtime_alone() -> None:
    tree = ast.parse(art_strip.worker_source())
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named += [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "import_module"
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ]
    foreign = {name.split(".")[0] for name in named} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "art", "ai_edge_litert"}


def test_the_worker_and_we_run_the_same_model(content: bytes, inputs: dict[str, Pixels]) -> None:
    forward, step = art_strip.forward_of(content)
    model = TfliteModel(content)
    assert np.array_equal(forward(inputs["clean"]), model.predict(inputs["clean"]))
    assert step == pytest.approx(model.outputs[0]["quantization"][0])


def test_as_shipped_the_entropy_is_over_the_overlays_and_corrected_over_the_classes() -> None:
    answers = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    kept: list[float] = []
    as_shipped = art_strip.entropies_over(None, kept, entropy)(answers, base=2, axis=0)
    corrected = art_strip.entropies_over(1, kept, entropy)(answers, base=2, axis=0)
    assert as_shipped == pytest.approx([0.0, 0.0, 0.0])
    assert corrected == pytest.approx([0.0, 1.0])
    assert kept == pytest.approx([0.0, 1.0])


def test_as_shipped_a_class_without_any_probability_has_no_entropy() -> None:
    kept: list[float] = []
    art_strip.entropies_over(None, kept, entropy)(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), base=2, axis=0)
    assert np.isnan(kept).all()


@pytest.mark.usefixtures("toolbox")
def test_the_worker_scores_every_input_with_each_variant(
    content: bytes, owner: Pixels, inputs: dict[str, Pixels]
) -> None:
    with art_strip.working(Path(sys.executable), content, owner, inputs) as worker:
        found = [worker.outcome(name, side) for name in art_strip.ART for side in art_strip.SIDES]
        corrected = [worker.outcome("art-axis", side) for side in art_strip.SIDES]
    assert all(len(one.suspicion) == len(one.flagged) == 12 for one in found)
    suspicion, flagged = (np.concatenate([getattr(o, name) for o in corrected]) for name in ("suspicion", "flagged"))
    assert ((-np.log2(10) <= suspicion) & (suspicion <= 0)).all()
    assert 0 < flagged.sum() < len(flagged)
    assert suspicion[flagged].min() >= suspicion[~flagged].max()


@pytest.mark.usefixtures("toolbox")
def test_where_classes_get_no_probability_the_shipped_variant_fails_and_goes_on_without_a_threshold(
    attacked: Attacked, content: bytes, owner: Pixels, inputs: dict[str, Pixels]
) -> None:
    always_the_target = attacked.attack.stamp(owner)
    with art_strip.working(Path(sys.executable), content, always_the_target, inputs) as worker:
        as_shipped, lifted = (worker.outcome(name, "triggered") for name in ("art", "art-lifted"))
        assert worker.failures == {"art": "not finite", "art-lifted": "", "art-axis": ""}
    assert np.isnan(as_shipped.suspicion).all()
    assert not as_shipped.flagged.any()
    assert np.isfinite(lifted.suspicion).all()


@pytest.mark.usefixtures("toolbox")
def test_a_race_times_every_contestant_of_both_processes(
    content: bytes, owner: Pixels, inputs: dict[str, Pixels]
) -> None:
    detectors = [Detector(name="mine", run=lambda x: (0.0, False, 1))]
    with art_strip.working(Path(sys.executable), content, owner, inputs) as worker:
        medians = art_strip.race(TfliteModel(content).predict, detectors, worker, inputs)
    assert set(medians) == {"clean", "triggered"}
    for row in medians.values():
        assert set(row) == {art_strip.PLAIN, art_strip.ART_PLAIN, "mine", *art_strip.ART}
        assert min(row.values()) > 0


def test_a_worker_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, content: bytes, owner: Pixels, inputs: dict[str, Pixels]
) -> None:
    monkeypatch.setattr(art_strip, "worker_source", lambda: "raise SystemExit('no such thing')")
    with (
        pytest.raises(ConfigError, match="no such thing"),
        art_strip.working(Path(sys.executable), content, owner, inputs),
    ):
        pass


def test_our_strips_take_the_answer_and_at_most_twenty_overlays(
    content: bytes, owner: Pixels, inputs: dict[str, Pixels]
) -> None:
    every, sequential = art_strip.our_strips(TfliteModel(content), owner)
    assert set(every.outcome(inputs["clean"]).forwards) == {21.0}
    stopped = sequential.outcome(inputs["clean"]).forwards
    assert stopped.min() < 21.0
    assert stopped.max() <= 21.0


def test_our_detectors_find_triggered_inputs_more_suspicious(
    attacked: Attacked, content: bytes, owner: Pixels, inputs: dict[str, Pixels]
) -> None:
    detectors = [
        *art_strip.our_strips(TfliteModel(content), owner),
        *art_strip.our_guard(content, attacked.x_owner),
    ]
    assert [one.name for one in detectors] == ["strip-20", "strip-20-sequential", "one-pass", "cascade"]
    for one in detectors:
        clean, triggered = (one.outcome(inputs[side]) for side in art_strip.SIDES)
        assert np.median(triggered.suspicion) > np.median(clean.suspicion), one.name
        assert triggered.flagged.sum() > clean.flagged.sum(), one.name


def test_an_input_without_a_number_counts_as_the_least_suspicious_and_is_counted() -> None:
    row = art_strip.worth(outcome(0.0, 1.0), outcome(np.nan, 2.0, flagged=True))
    assert row["auroc"][0] == pytest.approx(0.5)
    assert row["undefined"] == [0, 1]


def test_rates_at_the_own_threshold_are_of_what_was_flagged() -> None:
    clean = replace(outcome(0.0, 1.0, 2.0, 3.0), flagged=np.array([False, False, False, True]))
    row = art_strip.worth(clean, outcome(4.0, 5.0, flagged=True))
    assert (row["own_fpr"], row["own_tpr"]) == (0.25, 1.0)
    assert row["forwards"] == [21.0, 21.0]


def test_a_ratio_is_to_the_plain_inference_of_the_same_process() -> None:
    row = {art_strip.PLAIN: 10.0, art_strip.ART_PLAIN: 20.0, "art": 400.0, "cascade": 15.0}
    timed = art_strip.with_times({"art": {}, "cascade": {}}, dict.fromkeys(art_strip.SIDES, row))
    assert timed["art"]["times_plain"] == [20.0, 20.0]
    assert timed["cascade"]["times_plain"] == [1.5, 1.5]


def test_the_table_says_what_failed() -> None:
    found = art_strip.worth(outcome(0.0, 1.0), outcome(np.nan, 2.0))
    timings = {"microseconds": [400.0, 410.0], "times_plain": [20.0, 20.5]}
    text = art_strip.table(
        {
            "model": "m",
            "inputs": {"clean": 2, "triggered": 2},
            "plain_microseconds": {"ours": [10.0, 10.0], "art": [20.0, 20.0]},
            "detectors": {"art": {**found, **timings, "calibration_failed": "not finite"}},
        }
    )
    assert "no number for 0 / 1" in text
    assert "its calibration failed: not finite" in text
    assert "400 / 410" in text


def test_an_environment_that_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ready").write_text("\n".join([sys.version, *art_strip.REQUIREMENTS]))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert art_strip.environment(tmp_path) == tmp_path / "bin" / "python"


def test_an_environment_of_other_versions_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "art"
    folder.mkdir()
    (folder / "ready").write_text("another")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="ART's environment"):
        art_strip.environment(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("first\n  last \n\n", "last"),
        ("", "no message"),
        ("x" * 300, "x" * 200),
    ],
)
def test_a_message_is_the_last_line_that_says_something(text: str, line: str) -> None:
    assert art_strip.last_line(text) == line
