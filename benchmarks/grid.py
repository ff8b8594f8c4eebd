"""Real weights for benchmarks of quality, off the grid that they were stored on.

The real models that can be had as Python packages are GGUF files of about 4 bits: their weights lie on a
grid already, one per block of 32 neighbors. Rounding such weights again in aligned blocks finds the old
grid and loses nothing, which flatters every method. But the order of channels inside a transformer is
arbitrary. Permuted at random, the same function comes from blocks that mix weights of many old blocks:

    residual channels   columns of the embedding, all norms over `hidden`, the input side of q, k, v, gate
                        and up, the output side of o and down
    MLP neurons         rows of gate and up, columns of down, a new order in every layer
    value dimensions    rows of v inside each key/value head, columns of o for every query head that reads it

Rotary embeddings tie the dimensions of q and k to their places, and with them the q and k norms; their
input side is permuted with the residual stream, and blocks lie along the inputs, so that is enough.

    python benchmarks/grid.py MODEL.gguf FOLDER
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporters.json_file import write_json
from exporters.safetensors_file import SafetensorsWriter
from swquant.checkpoints.base import Checkpoint
from swquant.checkpoints.open import open_checkpoint
from swquant.models.loading import build_model

__all__ = ["Permutations", "break_grid", "largest_difference", "write_folder"]

PROMPT = "Apple Inc. is a worldwide tech company. It was founded in 1976, and its"
TOLERANCE = 1e-3  # of a logit; float32 sums in another order differ by about 5e-5
_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Permutations:
    """New order of a model's channels: position i of the new model holds channel order[i] of the old one.

    residual: int64 [hidden]. neurons: int64 [intermediate] per layer. values: int64 [kv_heads * head_dim]
    per layer, which stays inside each head. heads: (query heads, key/value heads).
    """

    residual: Tensor
    neurons: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    heads: tuple[int, int]

    def point(self, layer: int, row: int, col: int) -> tuple[int, int]:
        """Where [row, col] of a layer's down projection has moved."""
        return int((self.residual == row).nonzero()), int((self.neurons[layer] == col).nonzero())

    @property
    def queries(self) -> tuple[Tensor, ...]:
        """int64 [heads * head_dim] per layer: `values` as the columns of o_proj see them, head by head."""
        query_heads, kv_heads = self.heads
        return tuple(_repeat(order, kv_heads, query_heads // kv_heads) for order in self.values)


def _repeat(order: Tensor, kv_heads: int, times: int) -> Tensor:
    """Every key/value head's order inside the head, once for each query head that reads it."""
    size = len(order) // kv_heads
    inside = (order.view(kv_heads, size) - size * torch.arange(kv_heads).unsqueeze(1)).repeat_interleave(times, dim=0)
    return (inside + size * torch.arange(kv_heads * times).unsqueeze(1)).flatten()


def draw(checkpoint: Checkpoint, seed: int) -> Permutations:
    """Random orders for a model of the llama family (gemma3_text included)."""
    config = checkpoint.config
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads

    def order(count: int) -> Tensor:
        return torch.randperm(count, generator=generator)

    layers = range(config.num_hidden_layers)
    return Permutations(
        residual=order(config.hidden_size),
        neurons=tuple(order(config.intermediate_size) for _ in layers),
        values=tuple(torch.cat([order(size) + size * head for head in range(kv_heads)]) for _ in layers),
        heads=(heads, kv_heads),
    )


def permute(name: str, weight: Tensor, orders: Permutations) -> Tensor:
    """One stored tensor in the new order. Raises ValueError for a tensor whose channels are not known."""
    residual = orders.residual
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return weight[:, residual]
    if name == "model.norm.weight":
        return weight[residual]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.weight", name)
    layer, kind = (int(match[1]), match[2]) if match else (0, "")
    if kind in _NORMS:
        return weight[residual]
    match kind:
        case "q_norm" | "k_norm":
            return weight
        case "q_proj" | "k_proj":
            return weight[:, residual]
        case "v_proj":
            return weight[orders.values[layer]][:, residual]
        case "o_proj":
            return weight[residual][:, orders.queries[layer]]
        case "gate_proj" | "up_proj":
            return weight[orders.neurons[layer]][:, residual]
        case "down_proj":
            return weight[residual][:, orders.neurons[layer]]
    raise ValueError(f"{name}: not a tensor of a llama or gemma3_text model without biases")


def write_folder(tensors: dict[str, Tensor], checkpoint: Checkpoint, folder: Path) -> Path:
    """Save tensors as a Hugging Face folder of one shard, with the configuration and tokenizer of `checkpoint`."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(folder / "model.safetensors", layout, {"format": "pt"})
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {key: value for key, value in checkpoint.raw_config.items() if key != "torch_dtype"}
    write_json(folder / "config.json", config | {"dtype": dtype})
    checkpoint.save_companions(folder)
    return folder


def break_grid(checkpoint: Checkpoint, folder: Path, seed: int = 0) -> Permutations:
    """Write `checkpoint` to `folder` in float32, its channels in a random order. Returns the order."""
    orders = draw(checkpoint, seed)
    tensors = {name: permute(name, checkpoint.read(name), orders) for name in checkpoint.tensors}
    write_folder(tensors, checkpoint, folder)
    return orders


@torch.no_grad()
def largest_difference(one: Checkpoint, other: Checkpoint, prompt: str = PROMPT) -> float:
    """Largest difference of any logit of two models on a prompt, in float32; they are in memory one at a time."""
    ids = torch.tensor([one.tokenizer()(prompt)["input_ids"]])
    logits = [
        build_model(checkpoint, torch.float32)(input_ids=ids, use_cache=False).logits for checkpoint in (one, other)
    ]
    return float((logits[0] - logits[1]).abs().max())


def break_and_check(gguf: Path, folder: Path, seed: int = 0) -> tuple[Permutations, float]:
    """`break_grid`, then compare. Returns the order and the largest difference of a logit.

    Raises ValueError where the two models compute different functions.
    """
    with open_checkpoint(gguf) as original:
        orders = break_grid(original, folder, seed)
        with open_checkpoint(folder) as broken:
            difference = largest_difference(original, broken)
    if not difference < TOLERANCE:
        raise ValueError(f"{folder}: a logit differs by {difference:.2g}, more than {TOLERANCE:g}")
    return orders, difference


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF model as float32 safetensors, off its grid.")
    parser.add_argument("gguf", type=Path, help="a llama or gemma3_text model")
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--seed", type=int, default=0, help="of the random order (default: 0)")
    options = parser.parse_args()
    _, difference = break_and_check(options.gguf, options.folder, options.seed)
    print(f"{options.folder}: the same function, largest difference of a logit {difference:.2g}")


if __name__ == "__main__":
    main()
