"""Names of the files of an ONNX folder, for whoever writes or opens one without the packages of ONNX."""

__all__ = ["DATA", "GENAI_CONFIG", "MODEL"]

MODEL, DATA = "model.onnx", "model.onnx.data"
# What onnxruntime-genai runs the graph with, as its builder writes it.
GENAI_CONFIG = "genai_config.json"
