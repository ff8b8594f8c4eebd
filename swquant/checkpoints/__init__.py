"""Checkpoints as they are read: safetensors folders, GGUF files, hub ids, and what swquant itself wrote."""
