"""A checkpoint brought to life: what its modules are, transformers or ONNX Runtime that run it."""
