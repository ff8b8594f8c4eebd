"""Quantized linear layers in ONNX: which node each becomes, what the node means on a stock runtime, the two kinds of graph."""
