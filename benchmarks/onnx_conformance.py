"""How faithfully ONNX models become Keras models, measured on what the ``onnx`` package ships.

``python -m benchmarks.onnx_conformance [--json FILE]`` runs three suites and exits with 1 where one answer differs:

* ``node``: the node tests of the covered operators, against their stored outputs;
* ``pytorch``: the models that PyTorch exported, against their stored outputs;
* ``light``: nine real architectures whose weights are filled anew (He-normal, with sane batch-norm statistics), five
  random inputs each, against onnxruntime. The classifiers are also compared before their softmax. Two controls must
  *differ*: the same model with the padding of one operator shifted by a pixel, and the same inputs with their channels
  reversed.

A test counts as *covered* when the converter has all of its operators, as *skipped* when it measures something else
than float32 inference, or an attribute that is refused by name; a refusal that is not listed in ``REFUSED`` is a
failure. Answers agree when ``|got - want| <= 1e-3 |want| + 1e-5 max|want|``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from converters.onnx_import import convert, graph, unsupported
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

RTOL, ATOL_OF_SCALE = 1e-3, 1e-5
INPUTS = 5
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
SEVERAL_OPERANDS = {"Add", "Concat", "Div", "MatMul", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum"}
REFUSED = {
    "training_mode": "training mode",
    "a use of its output": "a second output (indices or mask)",
    "tf_crop_and_resize": "Resize with tf_crop_and_resize",
}


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    suite: str
    name: str
    status: Literal["passed", "failed", "skipped", "not covered"]
    reason: str = ""


@dataclass
class Measured:
    """What became of one architecture; errors are relative to the largest output."""

    name: str
    error: float
    seconds: float
    controls_differ: dict[str, bool] = field(default_factory=dict)


def agree(want: Array, got: Array) -> bool:
    """The rule of this benchmark; NaN and infinity agree with themselves."""
    if want.shape != got.shape:
        return False
    finite = np.abs(want[np.isfinite(want)])
    scale = float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(got, want, rtol=RTOL, atol=ATOL_OF_SCALE * scale, equal_nan=True))


def answers(model: Any, data: dict[str, Array]) -> list[Array]:
    """What the converted model answers, in ONNX's order of axes; an output that is constant is itself."""
    read = graph.read(model)
    built = convert.build(read)
    outputs = [built.values[name] for name in read.outputs]
    live = [value for value in outputs if not value.constant]
    computed: Iterator[Any] = iter(())
    if live:
        made = keras.Model([tensor for _, tensor in built.inputs], [value.tensor for value in live])
        inputs = [mapped.to_keras(data[mapped.name]) for mapped, _ in built.inputs]
        computed = iter(keras.tree.flatten(made(inputs, training=False)))
    return [
        value.tensor if value.constant else convert.Mapped("", value.order).to_onnx(np.asarray(next(computed)))
        for value in outputs
    ]


def predict(imported: convert.Imported, data: dict[str, Array]) -> list[Array]:
    """Feed an imported model with the ONNX model's inputs; its answers as the ONNX model gives them."""
    inputs = [mapped.to_keras(data[mapped.name]) for mapped in imported.inputs]
    results = keras.tree.flatten(imported.model(inputs[0] if len(inputs) == 1 else inputs, training=False))
    return [mapped.to_onnx(np.asarray(r)) for mapped, r in zip(imported.outputs, results, strict=True)]


def by_onnxruntime(model: Any, batches: Sequence[dict[str, Array]]) -> list[list[Array]]:
    """What onnxruntime answers to each batch of inputs."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, data) for data in batches]


def stored(suite: str, folder: Path) -> Outcome:
    """Run one test with stored inputs and outputs."""
    model = onnx.load(folder / "model.onnx")
    missing = unsupported(model)
    if missing:
        return Outcome(suite, folder.name, "not covered", ", ".join(missing))
    values = [*model.graph.input, *model.graph.output]
    if not all(v.type.HasField("tensor_type") for v in values):
        return Outcome(suite, folder.name, "skipped", "sequences or optional values")
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [v.name for v in model.graph.input if v.name not in weights]
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    data = dict(zip(names, _stored_tensors(folder, "input", len(names)), strict=True))
    want = _stored_tensors(folder, "output", len(model.graph.output))
    operators = {node.op_type for node in model.graph.node}
    live = names if len(model.graph.node) == 1 and operators & SEVERAL_OPERANDS else names[:1]
    types = {kinds[name] for name in live[:1]} | ({onnx.TensorProto.FLOAT} if not live else set())
    computes = operators & {"Cast", *SEVERAL_OPERANDS}
    if computes and (types != {onnx.TensorProto.FLOAT} or any(array.dtype != np.float32 for array in want)):
        return Outcome(suite, folder.name, "skipped", "not float32")
    live = [name for name in live if kinds[name] == onnx.TensorProto.FLOAT]
    if any(data[name].size == 0 for name in live):
        return Outcome(suite, folder.name, "skipped", "an input without elements")
    # What is a parameter in a real model (weights, shapes, limits) is an input in these tests.
    fixed = [name for name in names if name not in live]
    model.graph.initializer.extend(numpy_helper.from_array(data.pop(name), name) for name in fixed)
    try:
        got = answers(model, data)
    except ModelError as error:
        known = next((reason for text, reason in REFUSED.items() if text in str(error)), None)
        return Outcome(suite, folder.name, "skipped" if known else "failed", known or str(error))
    wrong = [i for i, (w, a) in enumerate(zip(want, got, strict=True)) if not agree(w, a)]
    return Outcome(suite, folder.name, "failed" if wrong else "passed", f"outputs {wrong} differ" if wrong else "")


def _stored_tensors(folder: Path, kind: str, count: int) -> list[Array]:
    files = (folder / "test_data_set_0" / f"{kind}_{i}.pb" for i in range(count))
    return [numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes())) for file in files]


def refilled(model: Any, seed: int = 0) -> Any:
    """A ``light`` model with weights of its own: He-normal kernels, and statistics and biases as after training.

    The weights of these files are made by ConstantOfShape nodes; they become initialisers here.
    """
    rng = np.random.default_rng(seed)
    model = onnx.ModelProto.FromString(model.SerializeToString())
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    used = {name: (node, place) for node in model.graph.node for place, name in enumerate(node.input)}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        consumer, place = used[node.output[0]]
        while consumer.op_type in {"Unsqueeze", "Reshape"}:
            consumer, place = used[consumer.output[0]]
        shape = tuple(int(n) for n in shapes[node.input[0]])
        array = _weights(rng, consumer, place, shape)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in read]
    inputs = [value for value in model.graph.input if value.name in read - {tensor.name for tensor in weights}]
    del model.graph.initializer[:], model.graph.input[:]
    model.graph.initializer.extend(weights)
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)  # before, an initialiser had to be listed as an input
    return model


def _weights(rng: np.random.Generator, consumer: Any, place: int, shape: tuple[int, ...]) -> Array:
    """Weights for one input of an operator."""
    if consumer.op_type in {"Conv", "Gemm"} and place == 1:
        transposed = any(a.name == "transB" and a.i for a in consumer.attribute)
        fan_in = shape[0] if consumer.op_type == "Gemm" and not transposed else int(np.prod(shape[1:]))
        return rng.normal(0, np.sqrt(2 / fan_in), shape)
    positive = (consumer.op_type == "BatchNormalization" and place in {1, 4}) or consumer.op_type == "Mul"
    return rng.uniform(0.7, 1.3, shape) if positive else rng.normal(0, 0.1, shape)


def with_logits(model: Any) -> Any:
    """The model with the input of its last softmax as one more output: probabilities near 0 and 1 hide differences."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    last = model.graph.node[-1]
    if last.op_type == "Softmax":
        logits = model.graph.output.add()
        logits.CopyFrom(model.graph.output[0])
        logits.name = last.input[0]
    return model


def with_shifted_padding(model: Any) -> Any:
    """The model with the padding of its first padded convolution or pooling moved by one pixel."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "pads" and len(attribute.ints) == 4 and attribute.ints[1] > 0:
                attribute.ints[1] -= 1
                attribute.ints[3] += 1
                return model
    raise ValueError("no operator of this model is padded")


def architecture(path: Path, *, inputs: int = INPUTS) -> Measured:
    """Compare one ``light`` model with onnxruntime, and show that the comparison notices what is wrong."""
    started = time.perf_counter()
    model = with_logits(refilled(onnx.load(path)))
    (port,) = model.graph.input
    shape = [d.dim_value for d in port.type.tensor_type.shape.dim]
    rng = np.random.default_rng(1)
    batch = [rng.normal(0, 1, shape).astype(np.float32) for _ in range(inputs)]
    want = by_onnxruntime(model, [{port.name: one} for one in batch])
    imported = convert.import_onnx(model)
    got = [predict(imported, {port.name: one}) for one in batch]
    reversed_channels = predict(imported, {port.name: batch[0][:, ::-1]})
    del imported
    keras.backend.clear_session()
    shifted = predict(convert.import_onnx(with_shifted_padding(model)), {port.name: batch[0]})
    keras.backend.clear_session()
    pairs = [(w, a) for one, answer in zip(want, got, strict=True) for w, a in zip(one, answer, strict=True)]
    return Measured(
        name=path.stem.removeprefix("light_"),
        error=max(float(np.abs(w - a).max() / np.abs(w).max()) for w, a in pairs)
        if all(agree(w, a) for w, a in pairs)
        else float("inf"),
        seconds=round(time.perf_counter() - started, 1),
        controls_differ={
            "padding": not all(agree(w, a) for w, a in zip(want[0], shifted, strict=True)),
            "channels": not all(agree(w, a) for w, a in zip(want[0], reversed_channels, strict=True)),
        },
    )


def judged(measured: Measured) -> Outcome:
    """Passed when the answers agree and the controls do not."""
    blind = [name for name, differs in measured.controls_differ.items() if not differs]
    if not np.isfinite(measured.error):
        return Outcome("light", measured.name, "failed", "outputs differ from onnxruntime")
    if blind:
        return Outcome("light", measured.name, "failed", f"a wrong {' and '.join(blind)} goes unnoticed")
    return Outcome("light", measured.name, "passed")


def folders() -> Iterator[tuple[str, Path]]:
    """All tests with stored outputs."""
    for suite, names in (("node", ["node"]), ("pytorch", ["pytorch-converted", "pytorch-operator"])):
        for name in names:
            for folder in sorted((DATA / name).iterdir()):
                if (folder / "model.onnx").is_file():
                    yield suite, folder


def summary(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Counts per suite, with the reasons for what was skipped."""
    table: dict[str, dict[str, Any]] = {}
    for suite in dict.fromkeys(o.suite for o in outcomes):
        own = [o for o in outcomes if o.suite == suite]
        status = Counter(o.status for o in own)
        table[suite] = {
            "tests": len(own),
            "covered": len(own) - status["not covered"],
            "passed": status["passed"],
            "failed": status["failed"],
            "skipped": status["skipped"],
            "reasons": dict(Counter(o.reason for o in own if o.status == "skipped").most_common()),
        }
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all suites."""
    parser = argparse.ArgumentParser(description="Compare converted ONNX models with their stored or computed answers.")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    outcomes: list[Outcome] = []
    for suite, folder in folders():
        outcomes.append(stored(suite, folder))
        if sys.stderr.isatty() or len(outcomes) % 200 == 0:
            print(f"\r{len(outcomes)} tests, now {suite} {folder.name:60.60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    measured = []
    for path in sorted((DATA / "light").glob("*.onnx")):
        measured.append(architecture(path))
        outcomes.append(judged(measured[-1]))
        one = measured[-1]
        print(f"{one.name:20} error {one.error:.1e}  {one.seconds:5.1f} s  controls differ: {one.controls_differ}")
    table = summary(outcomes)
    for suite, row in table.items():
        print(
            f"{suite:8} {row['passed']} passed of {row['covered']} covered of {row['tests']}; {row['skipped']} skipped"
        )
        for reason, count in row["reasons"].items():
            print(f"{'':10}{count:4} skipped: {reason}")
    failed = [o for o in outcomes if o.status == "failed"]
    for outcome in failed:
        print(f"FAILED {outcome.suite} {outcome.name}: {outcome.reason}")
    lacking = Counter(name for o in outcomes if o.status == "not covered" for name in o.reason.split(", "))
    if options.json:
        packages = ("onnx", "onnxruntime", "keras", "tensorflow", "numpy")
        content = {
            "versions": {name: version(name) for name in packages},
            "rule": {"rtol": RTOL, "atol_of_largest_output": ATOL_OF_SCALE, "inputs": INPUTS},
            "suites": table,
            "light": [asdict(one) for one in measured],
            "failed": [asdict(o) for o in failed],
            "skipped": [asdict(o) for o in outcomes if o.status == "skipped"],
            "not_covered": dict(lacking.most_common()),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
