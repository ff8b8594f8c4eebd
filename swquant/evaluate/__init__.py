"""`eval` and `generate`: a model run on text."""
