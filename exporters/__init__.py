"""Artifacts and what runs them: file formats, packing layouts, and (later) runtime operators."""
