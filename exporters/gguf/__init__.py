"""GGUF, the files of llama.cpp: types of blocks, names and numbers of architectures, the file itself."""
