"""The parts of `benchmarks/distillation.py`: one file each, and what they share."""
