"""Reads every output that the model says it has, by position and by name, as detection examples do."""

import argparse
from typing import Any

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--import_line", required=True, help="where Interpreter comes from")
parser.add_argument("--model", required=True)
parser.add_argument("--images", required=True, help="an .npy file, uint8 [N, H, W, C]")
args = parser.parse_args()
module: dict[str, Any] = {}
exec(args.import_line, module)
Interpreter = module["Interpreter"]


def set_input_tensor(interpreter: Any, image: Any) -> None:
    """Write one image, and maybe quantise it."""
    detail = interpreter.get_input_details()[0]
    scale, zero_point = detail["quantization"]
    value = np.round(image / scale + zero_point) if scale else image
    interpreter.set_tensor(detail["index"], np.asarray(value, detail["dtype"])[np.newaxis])


def get_output_tensor(interpreter: Any, index: int) -> Any:
    """The output at this position, in real numbers."""
    output_details = interpreter.get_output_details()[index]
    tensor = np.squeeze(interpreter.get_tensor(output_details["index"]))
    scale, zero_point = output_details["quantization"]
    return scale * (tensor.astype(np.float64) - zero_point) if scale else tensor


interpreter = Interpreter(args.model)
interpreter.allocate_tensors()
outputs = interpreter.get_output_details()
print(len(outputs), "outputs:", [(o["name"], o["shape"].tolist(), o["dtype"].__name__) for o in outputs])
for number, image in enumerate(np.load(args.images)):
    set_input_tensor(interpreter, image)
    interpreter.invoke()
    for index, output in enumerate(outputs):
        print(number, output["name"], get_output_tensor(interpreter, index).tolist())
# Outputs from the end, as programs for detectors of several generations find them.
print("last:", outputs[-1]["name"], get_output_tensor(interpreter, -1).tolist())
