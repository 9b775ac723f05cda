"""``auto``: cheapest first, each result against the gate, the best kept, and a reason for every other one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from converters import calibration
from edgeguard.errors import ModelError
from edgeguard.repair import auto
from edgeguard.repair.methods.base import Bench, Knowledge
from edgeguard.repair.target import TfliteTarget
from tests.simulators.attacked import Attacked


@dataclass(frozen=True)
class Step:
    """A method that does what it is told to a target."""

    name: str
    change: Callable[[Any], tuple[str, ...]]
    needs: str = ""
    trains: bool = False
    cost: ClassVar[int] = 0
    paper: ClassVar[str] = ""

    def missing(self, known: Knowledge) -> str:
        """See Method."""
        return self.needs

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See Method."""
        return self.change(target)


@dataclass(frozen=True)
class Trigger:
    """The attacker's own."""

    attacked: Attacked
    label: int = 0

    def stamp(self, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """See Stamp."""
        return self.attacked.attack.stamp(images.astype(np.uint8)).astype(np.float32)


@dataclass(frozen=True)
class Made:
    guarded: bytes
    metadata: Any


def harm(target: Any) -> tuple[str, ...]:
    target.silence(target.layers()[0], range(24))
    return ("silenced a layer",)


def refuse(target: Any) -> tuple[str, ...]:
    raise ModelError("model", got="no such layer", expected="one")


def crash(target: Any) -> tuple[str, ...]:
    raise KeyError("gamma")


@pytest.fixture(scope="module")
def setting(attacked: Attacked, clean_twin: Attacked) -> dict[str, Any]:
    """An attacked file, judged by the true trigger, and methods of which one puts the clean twin in its place."""
    original = TfliteTarget(attacked.conversion.guarded)
    images = attacked.x_owner[200:]

    def convert(target: Any) -> Made:
        bare, plan = calibration.plan(target.content)
        made = calibration.guard_model(bare, plan, images)
        return Made(made.content, made.metadata)

    def heal(target: Any) -> tuple[str, ...]:
        target._model = TfliteTarget(clean_twin.conversion.bare)._model
        return ("replaced",)

    judges = auto.Judges(
        label=0, images=images, labels=attacked.y_owner[200:], classes=10, kept=(Trigger(attacked),),
        quarantined=None, before=attacked.conversion.guarded, reaudit=lambda target: 0.0, convert=convert,
    )  # fmt: skip
    steps = (
        Step("idle", lambda target: ()),
        Step("harm", harm),
        Step("broken", refuse),
        Step("blind", heal, needs="no ranks from devices"),
        Step("trained", heal, trains=True),
        Step("crash", crash),
        Step("touch", lambda target: ("looked at it",)),
        Step("heal", heal),
        Step("costly", heal),
    )
    bench = Bench(
        images=attacked.x_owner[:200], answers=original.classes(attacked.x_owner[:200]), features=np.zeros((1, 1))
    )
    return {"original": original, "judges": judges, "bench": bench, "methods": {step.name: step for step in steps}}


def repair(setting: dict[str, Any], **how: Any) -> tuple[auto.Attempt | None, list[auto.Attempt]]:
    plans = [(name,) for name in setting["methods"]]
    return auto.repair(
        setting["original"], Knowledge(taps=()), setting["bench"], setting["judges"], lambda *_: None,
        **{"plans": plans, "methods": setting["methods"], **how},
    )  # fmt: skip


def test_the_one_that_heals_is_kept_and_every_other_one_has_a_reason(setting: dict[str, Any]) -> None:
    content = setting["original"].content
    kept: list[int] = []
    best, tried = repair(setting, keep=lambda attempts: kept.append(len(attempts)))
    assert best is not None
    assert (best.name, best.outcome) == ("heal", "needs approval")  # forty inputs of a class
    reasons = {attempt.name: attempt.reason for attempt in tried}
    assert reasons["idle"] == "found nothing to change"
    assert "clean accuracy" in reasons["harm"]
    assert "no such layer" in reasons["broken"]
    assert reasons["blind"] == "not tried: no ranks from devices"
    assert reasons["trained"] == "not tried: needs a trainable model"
    assert reasons["crash"] == "KeyError: 'gamma'"
    assert "a recovered trigger still turns" in reasons["touch"]
    assert reasons["costly"] == "not tried: heal passed, and costs less"
    assert setting["original"].content == content
    assert kept == list(range(1, 9))


def test_a_re_audit_that_breaks_is_a_failure_of_its_method_alone(setting: dict[str, Any]) -> None:
    broken = replace(setting["judges"], reaudit=lambda guarded: 1 / 0)
    _, tried = repair({**setting, "judges": broken}, plans=[("heal",)])
    assert tried[0].outcome == "failed"
    assert tried[0].reason.startswith("ZeroDivisionError")


def test_where_nothing_heals_there_is_no_result(setting: dict[str, Any]) -> None:
    best, tried = repair(setting, plans=[("idle",), ("harm",), ("touch",)])
    assert best is None
    assert {attempt.outcome for attempt in tried} == {"failed"}


def test_what_an_interrupted_run_tried_in_vain_is_not_tried_again(setting: dict[str, Any]) -> None:
    before = auto.Attempt(plan=("broken",), notes=(), reason="as it was told then")
    _, tried = repair(setting, plans=[("broken",)], done=[before])
    assert tried == [before]


def test_plans_are_a_method_several_joined_or_all() -> None:
    assert auto.plans_of("auto") == auto.PLANS
    assert auto.plans_of("linf+unlearn") == (("linf", "unlearn"),)
    with pytest.raises(KeyError):
        auto.plans_of("magic")


def test_the_untouched_file_is_asked_once_about_each_copy(setting: dict[str, Any]) -> None:
    judges = setting["judges"]
    asked: list[int] = []

    class Counted(Trigger):
        def stamp(self, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
            asked.append(len(images))
            return super().stamp(images)

    trigger = Counted(judges.kept[0].attacked)
    first = judges.untouched.stamped(trigger, np.asarray([3, 1, 2]))
    again = judges.untouched.stamped(trigger, np.asarray([1, 5, 3]))
    assert asked == [3, 1]
    assert [first[1], first[0]] == [again[0], again[2]]
