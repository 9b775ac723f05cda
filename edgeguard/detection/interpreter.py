"""The TFLite Interpreter with a verdict: a program that imports ``edgeguard.Interpreter`` changes nothing else.

    from edgeguard import Interpreter

    interpreter = Interpreter(model_path="model.guarded.tflite")
    ...
    interpreter.invoke()
    if interpreter.verdict.flagged: ...

Arguments, methods, values and errors are those of the runtime that runs underneath (see ``runtime.py`` for the choice).

Rules enforced here:

* the model's own outputs are the runtime's; the guard's two outputs are hidden unless ``show_guard``;
* a verdict is that of the last invocation, by ``invoke`` or by a signature runner. Setting an input does not change
  it. There is none before the first one, after one that failed, and from ``allocate_tensors`` or
  ``resize_tensor_input`` until the next, for these take the outputs away;
* a model without a guard, or with one at odds with its metadata, runs as it is, and is "not checked". So is an input
  that holds NaN or infinity (a kernel may turn them into zeros, so that the scores do not tell), and one that was
  resized beyond the batch axis to what the guard was not calibrated for;
* an agent on this machine hears of every input of a guarded model (``reporting.py``). What was not checked is reported
  without scores, so that nobody takes it for clean.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeguard.contract import frames
from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection.guarded import GUARD_OUTPUTS, layout_of, verdict_of
from edgeguard.detection.reporting import Reporter, socket_path
from edgeguard.detection.runtime import interpreter_class
from edgeguard.detection.verdict import Status, Verdict, not_checked
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]
Details = dict[str, Any]

_WORST_FIRST: tuple[Status, ...] = ("flagged", "not checked", "not audited", "clean")
_LARGEST = float(np.finfo(np.float32).max)


class OpResolverType(enum.Enum):
    """Which kernels run, as every runtime names them."""

    AUTO = 0
    BUILTIN = 1
    BUILTIN_REF = 2
    BUILTIN_WITHOUT_DEFAULT_DELEGATES = 3


def load_delegate(library: str, options: dict[str, Any] | None = None) -> Any:
    """A delegate for ``experimental_delegates``, as the chosen runtime loads it, with the errors that it raises."""
    return _module(interpreter_class()).load_delegate(library, options)


class _Over:
    """Stands before an object of the runtime's: what it does not define itself is that one's."""

    _bare: Any

    def __getattr__(self, name: str) -> Any:
        if name == "_bare":  # a runtime that refused the model left none
            raise AttributeError(name)
        return getattr(self._bare, name)


class Interpreter(_Over):
    """A TFLite interpreter that also says what the model's guard thinks. Not for use from several threads at once.

    Args:
        model_path, model_content, experimental_delegates, num_threads, arguments, options: as the runtime takes them.
        experimental_op_resolver_type: of this module or of any runtime.
        show_guard: list the guard's outputs too.
        runtime: ``litert``, ``tflite-runtime`` or ``tensorflow``; chosen unless told.

    Raises:
        ConfigError: there is no such runtime.
        Exception: whatever the runtime raises for such arguments or such a file.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        model_content: bytes | None = None,
        experimental_delegates: Sequence[Any] | None = None,
        num_threads: int | None = None,
        experimental_op_resolver_type: Any = OpResolverType.AUTO,
        *arguments: Any,
        show_guard: bool = False,
        runtime: str | None = None,
        **options: Any,
    ) -> None:
        loaded = interpreter_class(runtime)
        self._bare = loaded(
            model_path,
            model_content,
            experimental_delegates,
            num_threads,
            _resolver(loaded, experimental_op_resolver_type),
            *arguments,
            **options,
        )
        outputs = self._bare.get_output_details()
        has_guard = tuple(output["name"] for output in outputs[-2:]) == GUARD_OUTPUTS
        self._hidden: frozenset[str] = frozenset(GUARD_OUTPUTS if has_guard and not show_guard else ())
        self._guard: _Guard | None = None
        self._unguarded = ""
        try:
            content = model_content or Path(os.fsdecode(model_path or "")).read_bytes()
            self._guard = _Guard.of(metadata_reader.read(content), self._bare.get_input_details(), outputs)
        except (ModelError, OSError) as error:
            self._unguarded = str(error)
        self._reporter = Reporter(socket_path())
        self._resized = False
        self._not_finite: list[Array] = []
        self._verdicts: tuple[Verdict, ...] | None = ()

    @property
    def verdict(self) -> Verdict | None:
        """What the guard thinks of the last invocation: of a batch, the worst verdict; None where there is none.

        Flagged is worse than not checked, not checked than not audited, and that than clean.
        """
        return min(self.verdicts, key=lambda v: (_WORST_FIRST.index(v.status), -v.score), default=None)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdict on each input of the last batch; a single one where the model has no guard."""
        if self._verdicts is None:
            self._verdicts = self._judge(None if self._guard is None else self._guard.read(self._bare))
        return self._verdicts

    @property
    def reports_dropped(self) -> int:
        """Reports that an agent, once there, did not take and that found no room to wait."""
        return self._reporter.dropped

    def allocate_tensors(self) -> Any:
        """Allocate the tensors. Needed before anything is set or run."""
        self._forget()
        result = self._bare.allocate_tensors()
        self._see_shapes()
        return result

    def resize_tensor_input(self, input_index: int, tensor_size: Any, strict: bool = False) -> None:
        """Give an input another shape; ``allocate_tensors`` has to follow."""
        self._forget()
        self._bare.resize_tensor_input(input_index, tensor_size, strict)

    def get_input_details(self) -> list[Details]:
        """Details of the inputs: name, index, shape, dtype, quantisation."""
        return self._bare.get_input_details()

    def get_output_details(self) -> list[Details]:
        """Details of the model's own outputs; with ``show_guard`` the guard's two follow."""
        outputs: list[Details] = self._bare.get_output_details()
        return outputs[:-2] if self._hidden else outputs

    def get_tensor_details(self, *arguments: Any, **options: Any) -> list[Details]:
        """Details of every tensor of the graph, those of the guard included."""
        return self._bare.get_tensor_details(*arguments, **options)

    def set_tensor(self, tensor_index: int, value: Any) -> None:
        """Copy a value into an input."""
        self._bare.set_tensor(tensor_index, value)

    def get_tensor(self, tensor_index: int, subgraph_index: int = 0) -> Any:
        """A copy of an output."""
        return self._bare.get_tensor(tensor_index, subgraph_index)

    def tensor(self, tensor_index: int) -> Any:
        """A function that gives a view of a tensor's memory. Hold the function, not the view."""
        return self._bare.tensor(tensor_index)

    def invoke(self) -> None:
        """Run the model, and its guard with it."""
        self._forget()
        self._bare.invoke()
        self._finish()

    def reset_all_variables(self) -> Any:
        """Set the variables of a model that has any to their first values."""
        return self._bare.reset_all_variables()

    def get_signature_list(self) -> dict[str, dict[str, list[str]]]:
        """Names of the inputs and outputs of each signature; those of the guard only with ``show_guard``."""
        signatures: dict[str, dict[str, list[str]]] = self._bare.get_signature_list()
        for signature in signatures.values():
            signature["outputs"] = [name for name in signature["outputs"] if name not in self._hidden]
        return signatures

    def get_signature_runner(self, signature_key: str | None = None) -> SignatureRunner:
        """A function that runs a signature on named inputs."""
        return SignatureRunner(self, self._bare.get_signature_runner(signature_key))

    def _forget(self) -> None:
        self._verdicts = ()

    def _see_shapes(self) -> None:
        self._resized = self._guard is not None and _shapes(self._bare.get_input_details()) != self._guard.shapes

    def _finish(self) -> None:
        """After a run: the verdict waits to be asked for, but for what the next input may overwrite."""
        self._verdicts = None
        if self._guard is None:
            return
        self._not_finite = self._guard.not_finite(self._bare)
        if self._reporter.attached():
            self._report(self._guard)

    def _judge(self, raw: _Raw | None) -> tuple[Verdict, ...]:
        if self._guard is None:
            return (not_checked(None, {}, self._unguarded),)
        if raw is None:
            return (not_checked(None, {}, "guard outputs that do not fit each other"),)
        count = len(raw.scores)
        doubts = [self._doubt(row, count) for row in range(count)]
        rows = zip(raw.predicted, raw.scores, raw.features, doubts, strict=True)
        return tuple(verdict_of(self._guard.description, *row) for row in rows)

    def _doubt(self, row: int, count: int) -> str | None:
        if self._resized:
            return "inputs of another shape than the guard was calibrated for"
        if any(len(rows) != count or rows[row] for rows in self._not_finite):
            return "NaN or infinite values in the input"
        return None

    def _report(self, guard: _Guard) -> None:
        raw = guard.read(self._bare)
        if raw is None:
            return

        def frame(row: int) -> bytes:
            if self._verdicts is None:
                self._verdicts = self._judge(raw)
            return guard.frame(self._verdicts[row], raw.features[row])

        self._reporter.offer(len(raw.scores), frame)


class SignatureRunner(_Over):
    """Runs one signature of an :class:`Interpreter`, guarded as it is. Made by ``get_signature_runner``."""

    def __init__(self, interpreter: Interpreter, bare: Any) -> None:
        self._owner = interpreter
        self._bare = bare

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        """Run on named inputs; the outputs by name."""
        self._owner._forget()
        try:
            result: dict[str, Any] = self._bare(**inputs)
        finally:
            self._owner._see_shapes()
        self._owner._finish()
        return self._own(result)

    def get_output_details(self) -> dict[str, Details]:
        """Details of the outputs by name."""
        return self._own(self._bare.get_output_details())

    def _own(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in outputs.items() if name not in self._owner._hidden}


class _Raw(NamedTuple):
    """What the guard's outputs hold: scores [N, detectors], features [N, D], and the predicted classes [N]."""

    scores: Array
    features: Array
    predicted: Sequence[int | None]


@dataclass(frozen=True, slots=True)
class _Guard:
    """A guard and where its file has it: indices of tensors."""

    description: GuardMetadata
    scores: int
    features: int
    classes: int | None
    sizes: tuple[int, int, int]
    """How many detectors, features and classes there are."""
    float_inputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs, without the batch axis."""

    @classmethod
    def of(cls, description: GuardMetadata, inputs: list[Details], outputs: list[Details]) -> _Guard:
        """Raises ModelError where the outputs do not fit the metadata."""
        layout = layout_of(outputs, description)
        return cls(
            description=description,
            scores=int(outputs[layout.scores]["index"]),
            features=int(outputs[layout.features]["index"]),
            classes=None if layout.classes is None else int(outputs[layout.classes]["index"]),
            sizes=(len(description.detectors), description.feature_count, len(description.classes)),
            float_inputs=tuple(int(i["index"]) for i in inputs if np.issubdtype(i["dtype"], np.floating)),
            shapes=_shapes(inputs),
        )

    def not_finite(self, bare: Any) -> list[Array]:
        """For each input with NaN or infinity, which of its rows [N] have any."""
        found = []
        for index in self.float_inputs:
            finite = np.isfinite(bare.tensor(index)())
            if not finite.all():
                rows = np.atleast_1d(finite)
                found.append(~rows.reshape(len(rows), -1).all(axis=1))
        return found

    def read(self, bare: Any) -> _Raw | None:
        """What the last run left in the outputs; None where their shapes do not fit each other."""
        scores, features = bare.get_tensor(self.scores), bare.get_tensor(self.features)
        count = scores.shape[0] if scores.ndim else 0
        detectors, width, classes = self.sizes
        if scores.shape != (count, detectors) or features.shape != (count, width):
            return None
        if self.classes is None:
            return _Raw(scores, features, [None] * count)
        answers = bare.get_tensor(self.classes)
        if answers.shape != (count, classes):
            return None
        return _Raw(scores, features, answers.argmax(axis=1).tolist())

    def frame(self, verdict: Verdict, features: Array) -> bytes:
        """The report on one input with its features [D]. Raises LinkError where the names make it too large."""
        checked = verdict.status != "not checked"
        scored = frames.Scored(
            model_digest=self.description.model_digest,
            guard_digest=self.description.guard_digest,
            predicted=verdict.predicted,
            # JSON has no infinity.
            scores=tuple(min(score, _LARGEST) if checked else None for score in verdict.scores.values()),
            detectors=tuple(verdict.scores),
            p_value=verdict.p_value,
            features=self.sizes[1],
        )
        return frames.encode(scored, features.astype("<f4").tobytes())


def _shapes(inputs: list[Details]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(one["shape"][1:].tolist()) for one in inputs)


def _module(loaded: Any) -> Any:
    """The runtime's module, which holds what stands beside its Interpreter."""
    return sys.modules[loaded.__module__]


def _resolver(loaded: Any, given: Any) -> Any:
    """The runtime's own member of that name; what has none goes on as it is, for the runtime to refuse."""
    return getattr(_module(loaded).OpResolverType, getattr(given, "name", ""), given)
