"""Quantized linear layers in ONNX: their nodes, what these mean on a stock runtime, the two kinds of graph."""
