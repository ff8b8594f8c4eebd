"""GGUF, the files of llama.cpp: types of blocks, names and numbers of architectures, vocabulary, the file itself."""
