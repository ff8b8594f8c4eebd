"""GPTQ and AWQ by GPTQModel: calibrated on text, the line to chase.

GPTQModel changes transformers and torch's settings when it is imported, and writes logs into the current folder: it
runs in a process of its own, in a temporary folder (this file is that process's program, too). What it saves is
decoded here.

    GPTQ   symmetric, activation order aware of groups (its defaults). Zero points are all the same, not counted
    AWQ    4 bits with zero points (its `gemm` format). Its scales go into the norms before the linear layers
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["METHODS"]

PEERS = Path(__file__).parents[2] / ".peers"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where output i of eight stands in a word of AWQ's


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [in * bits / 32, out], low bits first -> float [in, out]."""
    stream = (words.unsqueeze(1) >> torch.arange(32).view(1, -1, 1)) & 1  # [words, 32, out]
    codes = stream.reshape(-1, bits, words.shape[1])
    return (codes << torch.arange(bits).view(1, -1, 1)).sum(dim=1).float()


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [rows, out / 8] -> float [rows, out]."""
    shifts = torch.tensor([4 * place for place in AWQ_ORDER])
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1).float()


def decode(parts: Mapping[str, Tensor], bits: int, awq: bool) -> tuple[Tensor, int]:
    """One saved linear layer -> (weight [out, in], bytes)."""
    scales = parts["scales"].float()  # [groups, out]
    codes = unpack_awq(parts["qweight"]) if awq else unpack(parts["qweight"], bits)
    group = len(codes) // len(scales)
    nbytes = parts["qweight"].nbytes + parts["scales"].nbytes + (parts["qzeros"].nbytes if awq else 0)
    if awq:
        index = torch.arange(len(codes)) // group
        zero = unpack_awq(parts["qzeros"])[index]
    else:
        index = parts["g_idx"].long()
        zero = torch.full_like(codes, float(1 << (bits - 1)))
    return ((codes - zero) * scales[index]).T.contiguous(), nbytes


def quantize(method: str) -> Callable[..., Any]:
    def run(original: Any, cell: Any) -> Any:
        from importlib import metadata

        from safetensors import safe_open

        from peers.base import Outcome, group_of

        metadata.version("gptqmodel")  # raises PackageNotFoundError
        groups = {name: group_of(cell, original.checkpoint.tensors[name].shape[1]) for name in original.linears}
        whole = cell.block == "channel"
        job = {
            "folder": str(original.folder),
            "method": method,
            "bits": cell.bits,
            "group": -1 if whole else int(cell.block),
            "others": {} if whole else {name: size for name, size in groups.items() if size != int(cell.block)},
            "ids": [ids.tolist() for ids in original.calibration_ids],
            "threads": torch.get_num_threads(),
        }
        with tempfile.TemporaryDirectory(prefix="swquant-quality-") as scratch:
            Path(scratch, "job.json").write_text(json.dumps(job))
            command = [sys.executable, str(Path(__file__)), "job.json"]
            environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}  # its own default of 1 fails on two cores
            ran = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
            saved = Path(scratch, "out", "model.safetensors")
            if ran.returncode or not saved.exists():
                last = next((text for text in reversed(ran.stderr.splitlines()) if text.strip()), "no message")
                raise RuntimeError(f"GPTQModel: {last}")
            state: dict[str, Tensor] = {}
            total = 0
            with safe_open(saved, "pt") as file:
                names = set(file.keys())
                for name in original.linears:
                    module = name.removesuffix(".weight")
                    keys = ("qweight", "scales", "qzeros", "g_idx")
                    parts = {key: file.get_tensor(f"{module}.{key}") for key in keys if f"{module}.{key}" in names}
                    state[name], nbytes = decode(parts, cell.bits, method == "awq")
                    total += nbytes
                for name in names & set(original.checkpoint.tensors):  # norms that scales went into
                    stored = file.get_tensor(name).float()
                    if "norm" in name and stored.shape == original.checkpoint.tensors[name].shape:
                        state[name] = stored
        return Outcome(state, total)

    return run


def program(path: Path) -> None:
    """Quantize as job.json says and save to ./out."""
    sys.path.append(str(PEERS))
    job = json.loads(path.read_text())
    torch.set_num_threads(job["threads"])
    from gptqmodel import GPTQModel, QuantizeConfig

    dynamic = {rf"+:.*{name.removesuffix('.weight')}$": {"group_size": size} for name, size in job["others"].items()}
    options: dict[str, Any] = {"bits": job["bits"], "group_size": job["group"], "dynamic": dynamic or None}
    if job["group"] == -1:
        options |= {"act_group_aware": False}  # its own rule: not with one scale per row
    if job["method"] == "awq":
        options |= {"method": "awq", "format": "gemm", "sym": False}
    model = GPTQModel.load(job["folder"], QuantizeConfig(**options), device="cpu", dtype=torch.float32)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["ids"]], batch_size=4)
    model.save("out")


def methods() -> list[Any]:
    from peers.base import CELLS, Method

    packages = ("gptqmodel",)
    four = tuple(cell for cell in CELLS if cell.bits == 4)
    return [
        Method("GPTQ", packages, "GPTQModel, QuantizeConfig(sym=True)", quantize("gptq"), CELLS, calibrated=True),
        Method("AWQ", packages, "GPTQModel, QuantizeConfig(method='awq')", quantize("awq"), four, calibrated=True),
    ]


if __name__ == "__main__":
    program(Path(sys.argv[1]))
else:
    METHODS = methods()
