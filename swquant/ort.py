"""What a program that runs exported models itself needs: where the operator library is, and a session with it.

import swquant.ort, onnxruntime  # in this order: it switches the runtime's telemetry off

options = onnxruntime.SessionOptions()
if library := swquant.ort.library_path():  # without it, the file's own function is used
    options.register_custom_ops_library(str(library))
session = onnxruntime.InferenceSession("folder/model.onnx", options)
"""

from swquant.models.runtime import library_path, open_session

__all__ = ["library_path", "open_session"]
