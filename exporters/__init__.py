"""Artifacts on disk and what runs them: file formats, packing, runtime operators. No models, no terminal."""
