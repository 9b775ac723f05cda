"""Prints the five likeliest classes of one input, in the shape of the usual image classification example."""

import argparse
from typing import Any

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--import_line", required=True, help="where Interpreter comes from")
parser.add_argument("-m", "--model_file", required=True)
parser.add_argument("-i", "--image", required=True, help="an .npy file, uint8 [H, W, C]")
parser.add_argument("--num_threads", type=int, default=None)
args = parser.parse_args()
module: dict[str, Any] = {}
exec(args.import_line, module)
Interpreter = module["Interpreter"]

interpreter = Interpreter(model_path=args.model_file, num_threads=args.num_threads)
interpreter.allocate_tensors()

input_details = interpreter.get_input_details()
output_details = interpreter.get_output_details()
floating_model = input_details[0]["dtype"] == np.float32

image = np.load(args.image)
height, width = input_details[0]["shape"][1:3]
assert image.shape[:2] == (height, width)
input_data: Any = np.expand_dims(image, axis=0)
if floating_model:
    input_data = np.float32(input_data)
else:
    scale, zero_point = input_details[0]["quantization"]
    input_data = np.round(input_data / scale + zero_point).astype(input_details[0]["dtype"])

interpreter.set_tensor(input_details[0]["index"], input_data)
interpreter.invoke()

results = np.squeeze(interpreter.get_tensor(output_details[0]["index"]))
scale, zero_point = output_details[0]["quantization"]
for label in results.argsort()[-5:][::-1]:
    print(f"{(float(results[label]) - zero_point) * (scale or 1.0):08.6f}: {label}")
