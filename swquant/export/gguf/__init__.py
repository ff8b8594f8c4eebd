"""Export to a GGUF file: options, tensors, header, importance matrix; `pipeline` knows the order."""
