"""Export to a folder for MLX; `pipeline` knows the order."""
