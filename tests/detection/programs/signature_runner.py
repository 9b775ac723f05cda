"""Runs the model by the names of its signature."""

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

interpreter = Interpreter(model_path=args.model)
signatures = interpreter.get_signature_list()
print(signatures)
run = interpreter.get_signature_runner()
inputs, outputs = run.get_input_details(), run.get_output_details()
print(sorted(inputs), sorted(outputs))
name, detail = next(iter(inputs.items()))
scale, zero_point = detail["quantization"]
for image in np.load(args.images):
    value = np.round(image / scale + zero_point) if scale else image
    result = run(**{name: np.asarray(value, detail["dtype"])[np.newaxis]})
    print({key: result[key].tolist() for key in sorted(result)})
try:
    interpreter.get_signature_runner("no such signature")
except ValueError as error:
    print(error)
