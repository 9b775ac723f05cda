"""The table of operators: what each ONNX operator becomes.

An operator is one function ``(builder, node, *inputs) -> Value`` (or several values); an input that the node leaves out
is None. It raises ``ValueError`` for what it cannot do; the caller adds the operator's name. Attributes that it did not
read are refused after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from converters.onnx_import.builder import Value

Operator: TypeAlias = Callable[..., Value | Sequence[Value]]

TABLE: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Enter a function into the table under the names of ONNX operators."""

    def enter(function: Operator) -> Operator:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return enter
