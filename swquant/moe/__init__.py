"""`moe`: MLPs of a dense model become pyramid-residual mixtures of experts, without changing what the model
computes."""
