"""Writes inputs and reads outputs through views of the interpreter's memory, without copies."""

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

with open(args.model, "rb") as file:  # noqa: PTH123
    interpreter = Interpreter(model_content=file.read())
interpreter.allocate_tensors()
detail = interpreter.get_input_details()[0]
entry = interpreter.tensor(detail["index"])
answer = interpreter.tensor(interpreter.get_output_details()[0]["index"])
scale, zero_point = detail["quantization"]

for image in np.load(args.images):
    entry()[0] = np.round(image / scale + zero_point) if scale else image
    interpreter.invoke()
    print(answer().argmax(), answer().tolist())

held = answer()
try:
    interpreter.invoke()
except RuntimeError as error:
    print("refused while a view is held:", " ".join(str(error).split()))
del held
interpreter.invoke()
print(answer().tolist())
