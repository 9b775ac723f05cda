"""What is computed on a shared model, in clear and under three-party computation within one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.inspection import index
from tests.simulators import needs
from tests.simulators import private as making

jax = needs.python_module("jax", "jax", until=(3, 11))
spu = needs.python_module("spu", "spu", until=(3, 11))


@pytest.fixture(autouse=True)
def wide() -> Any:
    with jax.experimental.enable_x64():
        yield


@pytest.fixture(scope="module")
def joint() -> Any:
    """Three parties as threads: the protocol, without a line between them."""
    from spu.utils import simulation

    simulator = simulation.Simulator.simple(3, spu.ProtocolKind.ABY3, spu.FieldType.FM64)
    return lambda program, *inputs: simulation.sim_jax(simulator, program)(*inputs)


@given(
    sizes=st.lists(st.floats(0.5, 50.0), min_size=4, max_size=12, unique=True),
    working=st.integers(0, 2**12 - 1),
)
@settings(max_examples=8, deadline=None)
def test_the_decision_is_the_one_of_an_audit(sizes: list[float], working: int) -> None:
    from edgeguard.private import inspecting

    works = np.asarray([bool(working >> i & 1) for i in range(len(sizes))])
    decided = jax.jit(inspecting.stands_out, static_argnums=2)
    flagged, comparable = decided(np.asarray(sizes), works, index.MAX_RATIO["patch"])
    known = np.where(works, sizes, np.inf)
    expected = [bool(works[i]) and index.stands_out("patch", index.measure(known, i), 1.0) for i in range(len(sizes))]
    assert (np.asarray(flagged).tolist(), bool(comparable)) == (expected, works.sum() > index.MIN_OTHERS)


@pytest.mark.parametrize(("backdoored", "labels"), [(True, [2]), (False, [])])
def test_a_backdoored_network_is_flagged_and_a_clean_one_is_not(backdoored: bool, labels: list[int]) -> None:
    from edgeguard.private import inspecting

    _, found = inspecting.in_clear(
        making.an_inspection(), making.a_network(backdoored=backdoored), making.clean_inputs(24)
    )
    assert (np.flatnonzero(found.flagged).tolist(), bool(found.comparable)) == (labels, True)


@pytest.mark.parametrize("layers", [3, 2], ids=["with a hidden layer", "features into the last layer"])
def test_a_step_goes_down_the_gradient_of_inputs_that_carry_the_trigger(layers: int) -> None:
    """The loss written out, with every input stamped by hand and the derivative of the pieces left to JAX."""
    from edgeguard.private import inspecting

    x, rng = making.clean_inputs(12), np.random.default_rng(1)
    network = [array + 0.1 * rng.normal(size=array.shape) for array in making.a_network(backdoored=True)]
    network = network if layers == 3 else network[:2]
    taken = 0.3 * rng.random((2, network[-1].shape[0], 25))

    def pieces(margin: Any) -> Any:
        """What has the sigmoid in three straight pieces as its derivative."""
        inner = 0.5 * margin + 0.125 * margin**2 + 0.5
        return jax.numpy.where(margin > 2, margin, jax.numpy.where(margin < -2, 0.0, inner))

    def loss(taken: Any) -> Any:
        total = 0.0
        for label in range(taken.shape[1]):
            a, b = taken[:, label]
            hidden = ((1 - a - b) * x + a) @ network[0] + network[1]
            z = jax.nn.relu(hidden) @ network[2] + network[3] if len(network) == 4 else hidden
            others = np.arange(z.shape[1]) != label
            total += jax.numpy.sum(pieces(z - z[:, label : label + 1])[:, others]) / len(x)
        return total

    found, _ = jax.jit(inspecting._gradient)(network, inspecting.basis(network, x), taken)
    np.testing.assert_allclose(found, jax.jit(jax.grad(loss))(taken), atol=1e-9)


def test_of_labels_that_are_not_flagged_nothing_is_shown() -> None:
    from edgeguard.private import inspecting

    _, found = inspecting.in_clear(making.an_inspection(), making.a_network(backdoored=True), making.clean_inputs(24))
    shown = np.abs(found.trigger).sum(axis=(0, 2))
    assert np.flatnonzero(shown).tolist() == [2]


def test_the_trigger_that_is_found_is_the_value_that_speaks_for_the_label() -> None:
    from edgeguard.private import inspecting

    _, found = inspecting.in_clear(making.an_inspection(), making.a_network(backdoored=True), making.clean_inputs(24))
    mask = found.trigger.sum(axis=0)[2]
    assert mask.argmax() == len(mask) - 1


@pytest.mark.parametrize("layers", [3, 2], ids=["with a hidden layer", "features into the last layer"])
def test_a_step_on_shares_is_the_step_in_clear(joint: Any, layers: int) -> None:
    from edgeguard.private import inspecting

    network = making.a_network(backdoored=True)[:layers] if layers == 2 else making.a_network(backdoored=True)
    widths = (25, 7, 6) if layers == 3 else (25, 7)
    asked = making.an_inspection(layers=widths)
    x = making.clean_inputs(12)

    def two_steps(x: Any, *w: Any) -> Any:
        basis = inspecting.basis(w, x)
        state = inspecting.begin(asked, w, basis)
        for _ in range(2):
            state = inspecting.step(w, basis, state, 0.2)
        return state.taken, state.weight

    for private, clear in zip(joint(two_steps, x, *network), two_steps(x, *network), strict=True):
        np.testing.assert_allclose(private, clear, atol=1e-2)


@pytest.mark.parametrize("loud", [None, 3])
def test_the_decision_on_shares_is_the_one_in_clear(joint: Any, loud: int | None) -> None:
    from edgeguard.private import inspecting

    sizes = np.asarray([9.8, 10.2, 9.9, 9.4, 10.9, 8.7, 10.3, 11.0])
    works = np.ones(8, dtype=bool)
    works[5] = False
    if loud is not None:
        sizes[loud] = 3.1
    flagged, comparable = joint(lambda s, w: inspecting.stands_out(s, w, 0.5), sizes, works)
    assert (np.flatnonzero(flagged).tolist(), bool(comparable)) == ([] if loud is None else [loud], True)


def test_whether_a_trigger_works_is_the_same_on_shares(joint: Any) -> None:
    """A trigger of the loud value for each label: it works for its own alone."""
    from edgeguard.private import inspecting

    network, x = making.a_network(backdoored=True), making.clean_inputs(12)
    taken = np.zeros((2, 6, 25))
    taken[0, :, -1] = 1.0

    def decided(x: Any, taken: Any, *w: Any) -> Any:
        return inspecting.works(w, x, taken)[0]

    private, clear = joint(decided, x, taken, *network), decided(x, taken, *network)
    assert np.asarray(private).tolist() == np.asarray(clear).tolist() == [label == 2 for label in range(6)]


def test_where_every_held_out_input_is_called_the_same_nothing_can_be_compared() -> None:
    from edgeguard.private import inspecting

    network = [array.copy() for array in making.a_network(backdoored=True)]
    network[-1][4] += 1000.0
    nothing = np.zeros((2, 6, 25))
    found = inspecting.decide(making.an_inspection(), network, making.clean_inputs(12), nothing)
    assert (bool(found.comparable), bool(np.asarray(found.flagged).any())) == (False, False)


def test_mending_forgets_the_trigger_and_keeps_clean_answers() -> None:
    from edgeguard.private import inspecting, mending

    asked, network, x = making.an_inspection(prune=1), making.a_network(backdoored=True), making.clean_inputs(24)
    _, found = inspecting.in_clear(asked, network, x)
    _, _, judged = mending.in_clear(asked, network, x, found.trigger)
    assert judged.turned_before >= 8
    assert (judged.kept, judged.turned_after) == (asked.held_out, 0)


def test_a_mending_on_shares_is_the_one_in_clear(joint: Any) -> None:
    from edgeguard.private import mending

    asked, network, x = making.an_inspection(prune=1), making.a_network(backdoored=True), making.clean_inputs(12)
    trigger = np.zeros((2, 6, 25))
    trigger[0, 2, -1] = 1.0

    def mended(x: Any, trigger: Any, *w: Any) -> Any:
        lesson, last = mending.begin(asked, w, x, trigger)
        for _ in range(3):
            last = mending.step(lesson, last)
        return (last.kernel, last.bias, *mending.judge(w, last, x, trigger))

    for private, clear in zip(joint(mended, x, trigger, *network), mended(x, trigger, *network), strict=True):
        np.testing.assert_allclose(private, clear, atol=1e-2)
