"""Export to an ONNX folder: options, linear layers, graph, check; `pipeline` knows the order."""
