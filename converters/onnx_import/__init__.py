"""ONNX models as trainable Keras models, with their channels last.

``graph`` reads a file and checks it, ``layout`` knows the orders of axes, ``windows`` the arithmetic of paddings,
``planning`` decides over the whole graph, ``builder`` is what operators build with, ``registry`` is their table, one
module per family fills it, and ``convert`` puts it together.
"""

from __future__ import annotations

from converters.onnx_import.convert import Imported, Mapped, import_onnx, to_keras, unsupported

__all__ = ["Imported", "Mapped", "import_onnx", "to_keras", "unsupported"]
