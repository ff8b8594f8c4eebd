"""`detect`: the prompt, the model run on it, what was found, and how it is told."""
