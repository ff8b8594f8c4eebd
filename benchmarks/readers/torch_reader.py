"""transformers, three ways: as it is, with `import swquant.hf`, and through `swquant.load`. See `deployments.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from timing import report

asked = json.load(sys.stdin)
path, how = Path(asked["file"]), asked["how"]
torch.set_num_threads(asked["threads"])
if how == "swquant":
    import swquant

    model = swquant.load(path)
else:
    if how == "hf":
        import swquant.hf
    from transformers import AutoModelForCausalLM

    place = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = AutoModelForCausalLM.from_pretrained(place[0], device_map="cpu", dtype="auto", **place[1])
model.eval()


def written(count: int) -> list[int]:
    prompt = torch.tensor([asked["prompt"]])
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=count, max_new_tokens=count
    )
    return ids[0, prompt.shape[1] :].tolist()


with torch.no_grad(), Path(asked["out"]).open("wb") as file:
    for window in asked["windows"]:
        file.write(model(torch.tensor([window])).logits[0].float().numpy().astype(np.float32).tobytes())
report(written, asked["tokens"])
