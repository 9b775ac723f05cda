"""A Keras model and its int8 file are repaired alike; the original stays what it was."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters import flatbuffer
from edgeguard.contract.guard import Tap
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ModelError
from edgeguard.inspection.networks import run
from edgeguard.repair.methods import METHODS
from edgeguard.repair.methods.base import Bench, Channel, Knowledge, prune
from edgeguard.repair.target import KerasTarget, TfliteTarget
from tests.simulators.attacked import Attacked


@pytest.fixture(scope="module")
def targets(attacked: Attacked) -> dict[str, Any]:
    return {"keras": KerasTarget(attacked.keras), "tflite": TfliteTarget(attacked.conversion.guarded)}


def bench(target: Any, attacked: Attacked) -> Bench:
    images = attacked.x_owner[:200]
    model = GuardedModel.load(attacked.conversion.guarded)
    features = np.asarray([model.infer(x).features for x in images], dtype=np.float64)
    return Bench(images=images, answers=target.classes(images), features=features)


def agreement(one: Any, other: Any, attacked: Attacked) -> float:
    images = attacked.x_owner[:200]
    return float(np.mean(one.classes(images) == other.classes(images)))


def tap(attacked: Attacked) -> Any:
    return next(tap for tap in attacked.conversion.metadata.taps if tap.kind == "linf")


def test_both_have_the_same_layers_and_kernels_but_for_rounding(targets: dict[str, Any]) -> None:
    layers = list(zip(targets["keras"].layers(), targets["tflite"].layers(), strict=True))
    assert layers
    for one, other in layers:
        first, second = targets["keras"].kernel(one), targets["tflite"].kernel(other)
        assert first.shape == second.shape
        assert np.corrcoef(first.ravel(), second.ravel())[0, 1] >= 0.999  # a rescaling may be folded into the first
        assert targets["keras"].inputs(one) == targets["tflite"].inputs(other)


@pytest.mark.parametrize("kind", ["keras", "tflite"])
def test_a_silenced_channel_is_zero_at_its_tap_and_the_original_is_not(
    attacked: Attacked, targets: dict[str, Any], kind: str
) -> None:
    original = targets[kind]
    changed = original.copy()
    layer, channels = changed.maker(tap(attacked)), [0, 5]
    changed.silence(layer, channels)
    assert not changed.kernel(layer)[channels].any()
    assert original.kernel(layer)[channels].any()
    if kind == "keras":
        import keras

        view = keras.Model(changed.model.inputs, changed.model.get_layer(tap(attacked).source_layer).output)
        active = run(view, attacked.x_owner[:20])
        assert not active[..., channels].any()
        assert active.any()


def test_pruning_a_file_changes_its_answers_as_pruning_the_model_does(
    attacked: Attacked, targets: dict[str, Any]
) -> None:
    images, answers = attacked.x_owner[:150], []
    for target in targets.values():
        changed = target.copy()
        changed.silence(changed.maker(tap(attacked)), range(16))
        answers.append(changed.classes(images))
    assert np.mean(answers[0] == answers[1]) >= 0.95
    assert np.mean(answers[1] == targets["tflite"].classes(images)) < 1.0


def test_a_changed_file_is_whole_and_as_large_as_it_was(attacked: Attacked, targets: dict[str, Any]) -> None:
    changed = targets["tflite"].copy()
    layer = changed.layers()[1]
    kernel = changed.kernel(layer)
    changed.zero(layer, np.abs(kernel) > kernel.std())
    flatbuffer.parse(changed.content)
    assert np.abs(changed.kernel(layer)).max() <= kernel.std()
    assert targets["tflite"].content == TfliteTarget(attacked.conversion.bare).content


@pytest.mark.parametrize("kind", ["keras", "tflite"])
def test_pruning_goes_as_far_as_the_clean_answers_stay(attacked: Attacked, targets: dict[str, Any], kind: str) -> None:
    target = targets[kind].copy()
    layer = target.maker(tap(attacked))
    ranked = [Channel(layer, channel, 0.0) for channel in range(len(target.kernel(layer)))]
    pruned = prune(target, ranked, bench(targets[kind], attacked))
    assert agreement(targets[kind], target, attacked) >= 0.99
    assert len(pruned) < len(ranked)
    assert [c.channel for c in pruned] == list(range(len(pruned)))


@dataclass
class Changed:
    """Answers the last so many of 200 inputs otherwise; ``asked`` is how many it was shown at a time."""

    count: int
    asked: list[int] = field(default_factory=list)

    def classes(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        self.asked.append(len(images))
        return (images.ravel() >= 200 - self.count).astype(np.int64)


@pytest.mark.parametrize(
    ("changed", "keeps", "asked"),
    [(0, True, [12, 38, 150]), (2, True, [12, 38, 150]), (3, False, [12, 38, 150]), (200, False, [12])],
)
def test_what_changes_too_many_answers_is_told_by_as_few_inputs_as_show_it(
    changed: int, keeps: bool, asked: list[int]
) -> None:
    images = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1)
    asking = Bench(images=images, answers=np.zeros(200, np.int64), features=np.zeros((1, 1)))
    target = Changed(changed)
    assert asking.keeps(target) is keeps  # type: ignore[arg-type]
    assert target.asked == asked


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.trains])
def test_a_method_without_training_works_on_a_file(attacked: Attacked, targets: dict[str, Any], name: str) -> None:
    width = tap(attacked).channels
    known = Knowledge(
        taps=attacked.conversion.metadata.taps,
        shift=np.linspace(0, 5, attacked.conversion.metadata.feature_count),
        rankings={tap(attacked).source_layer: [tuple(range(width))] * 3},
        ballots={tap(attacked).source_layer: [tuple(range(width // 2))] * 3},
    )
    target = targets["tflite"].copy()
    METHODS[name].apply(target, known, bench(targets["tflite"], attacked))
    flatbuffer.parse(target.content)
    assert agreement(targets["tflite"], target, attacked) >= (0.9 if name == "clp" else 0.97)


def test_a_module_that_was_inserted_into_a_file_is_cut_out(attacked: Attacked) -> None:
    from edgeguard.attacks.trojannet import TrojanNet, implant

    attack = TrojanNet.for_shape(attacked.data.shape, target=3)
    host = attacked.conversion.bare
    infected = implant(host, attack, attack.module(len(attacked.data.classes), attacked.x_owner))
    target = TfliteTarget(infected)
    images = attacked.x_owner[attacked.y_owner != attack.target][:100]
    assert np.mean(target.classes(attack.stamp(images)) == attack.target) > 0.9

    operators = len(flatbuffer.parse(infected).subgraphs[0].operators)
    said = METHODS["excise"].apply(target, Knowledge(taps=()), bench(target, attacked))
    assert len(said) == 1
    assert np.mean(target.classes(attack.stamp(images)) == attack.target) < 0.1
    assert len(flatbuffer.parse(target.content).subgraphs[0].operators) < operators - 5
    assert np.mean(target.classes(images) == TfliteTarget(host).classes(images)) >= 0.98


def test_no_training_framework_is_loaded_to_repair_a_file() -> None:
    program = (
        "import sys, edgeguard.repair.command, edgeguard.repair.auto, edgeguard.repair.hunting;"
        "print([m for m in ('tensorflow', 'keras', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tap_is_found_by_its_whole_name(attacked: Attacked, targets: dict[str, Any]) -> None:
    target = targets["tflite"].copy()
    own = target.maker(tap(attacked))
    first = target.layers()[0]
    assert first != own
    tensor = next(t for t in target._model.subgraphs[0].tensors if flatbuffer.text(t.name) == first)
    tensor.name = f"{tap(attacked).tensor}1".encode()
    assert target.maker(tap(attacked)) == own


def small(*, frozen: tuple[bool, bool]) -> KerasTarget:
    """Two convolutions with batch-norms, of which some are frozen."""
    import keras

    x = inputs = keras.Input((8, 8, 1))
    for still in frozen:
        x = keras.layers.Conv2D(4, 3, use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(trainable=not still)(x))
    x = keras.layers.Dense(10, activation="softmax")(keras.layers.GlobalAveragePooling2D()(x))
    return KerasTarget(keras.Model(inputs, x))


def test_neuron_pruning_leaves_a_frozen_batch_norm_alone(attacked: Attacked) -> None:
    target = small(frozen=(True, False))
    frozen = target.layers()[0]
    kernel = target.kernel(frozen)
    METHODS["anp"].apply(target, Knowledge(taps=()), bench(target, attacked))
    assert (target.kernel(frozen) == kernel).all()
    with pytest.raises(ModelError, match="that can be trained"):
        METHODS["anp"].apply(small(frozen=(True, True)), Knowledge(taps=()), bench(target, attacked))


def test_a_tap_of_another_model_is_refused(targets: dict[str, Any], attacked: Attacked) -> None:
    import msgspec

    other = msgspec.structs.replace(tap(attacked), source_layer="no_such_layer", tensor="no_such_tensor")
    for target in targets.values():
        with pytest.raises(ModelError, match="no_such"):
            target.maker(other)


def test_of_a_guards_taps_those_stay_whose_layers_were_not_cut_out(attacked: Attacked) -> None:
    from converters import calibration
    from edgeguard.attacks.trojannet import TrojanNet, implant

    attack = TrojanNet.for_shape(attacked.data.shape)
    module = attack.module(len(attacked.data.classes), attacked.x_owner)
    target: Any = TfliteTarget(implant(attacked.conversion.bare, attack, module))
    names = [planned.name for planned in calibration.plan(target.content)[1].taps]
    left = cut_and_tapped(target, names)
    assert 0 < len(left) < len(names)
    assert [planned.name for planned in calibration.plan(target.content, names=left)[1].taps] == list(left)

    target = KerasTarget(attack.merge(KerasTarget(attacked.keras).copy().model, module))
    assert cut_and_tapped(target, ["trojan_dense4", "conv3"]) == ("conv3",)


def cut_and_tapped(target: Any, names: list[str]) -> tuple[str, ...]:
    taps = [Tap(tensor=name, source_layer=name, kind="l1", offset=0, channels=1) for name in names]
    assert target.tapped(taps) == tuple(names)
    (branch,) = target.branches()
    target.cut(branch)
    return tuple(target.tapped(taps))
