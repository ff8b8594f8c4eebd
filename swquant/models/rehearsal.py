"""The rehearsal: what stock transformers would make of a checkpoint, before a byte of it is written.

transformers' own loader runs, on the meta device, with the configuration that would be written and with the names,
shapes and dtypes of the tensors that would be stored. It renames them, replaces modules and initializes what it
misses as it will later, and what it then lacks it would lack: a weight that is missing is a *random* weight in the
user's hands, told only in a warning. So what does not meet is mended or refused now.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from exporters.errors import first_line
from exporters.json_file import write_json
from exporters.packing import packed_words
from swquant.checkpoints.base import Checkpoint
from swquant.models.converted import sources
from swquant.models.loading import quiet
from swquant.models.stock import auto_class
from swquant.scratch import temporary_folder

__all__ = ["Rehearsal", "rehearse"]

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# compressed-tensors 0.18 to 0.20 make room for these unpacked in a module and then stop at packed ones, with an error.
_UNPACKED = ".weight_zero_point"


@dataclass(frozen=True)
class Rehearsal:
    """What went wrong. missing: parameters of the model that would be random. mismatched: of another shape than stored.
    zero_points: those of another shape than this version of compressed-tensors makes room for. unexpected: stored
    tensors that nobody takes. retyped: parameters that the model keeps in float32 and the loader would not. recast:
    numbers where the model has codes, or codes where it has numbers. lacking: a packed module whose `weight` the
    model's own code touches (such modules must stay dense). error: what the loader said where it gave up, "" where it
    did not."""

    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    zero_points: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    retyped: tuple[str, ...] = ()
    recast: tuple[str, ...] = ()
    lacking: str = ""
    error: str = ""

    @property
    def problem(self) -> str:
        """In a few words, "" if all is well. Tensors that nobody takes harm nobody: the original has them, too."""
        if self.error:
            return self.error
        if self.missing:
            return f"{len(self.missing)} weights would be missing, first {self.missing[0]}"
        if self.mismatched:
            return f"{self.mismatched[0]} would have another shape"
        if self.zero_points:
            return f"{self.zero_points[0]} would have another shape"
        return f"{self.retyped[0]} would not be float32, as the model keeps it" if self.retyped else ""


def rehearse(checkpoint: Checkpoint, config: Mapping[str, Any], layout: Layout) -> Rehearsal:
    """Load a checkpoint that is not there yet. config: what config.json will hold. layout: stored name -> (dtype,
    shape)."""
    state = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    try:
        with _in_silence():
            empty = _built(checkpoint, config)
            told = config.get("quantization_config", {})
            decoded = told.get("dequantize", False) or told.get("quant_method") == "metal"
            if not decoded and (name := _replaced_buffer(empty)):
                return Rehearsal(error=f"its own code replaces {name}, which a module that holds codes cannot")
            model, info = type(empty).from_pretrained(
                None,
                config=empty.config,
                state_dict=state,
                device_map={"": "meta"},
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except AttributeError as error:
        if error.name == "weight" and (module := _name_of(error)):
            return Rehearsal(lacking=module, error=f"its own code touches {module}.weight, which a packed layer lacks")
        return Rehearsal(error=first_line(error))
    except Exception as error:  # transformers raises nearly everything here
        return Rehearsal(error=first_line(error))
    channels = _bits_of_channels(told)
    mismatched = sorted(
        name
        for name, found, wanted in info["mismatched_keys"]
        if name in layout or not _bounded_by_words(found, wanted, channels)
    )
    return Rehearsal(
        missing=tuple(sorted(info["missing_keys"])),
        mismatched=tuple(name for name in mismatched if not name.endswith(_UNPACKED)),
        zero_points=tuple(name for name in mismatched if name.endswith(_UNPACKED)),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        retyped=_retyped(model),
        recast=_recast(empty, model, layout),
    )


def _bits_of_channels(told: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the codes that have one scale per row, so that nothing but weight_shape says how many there are in it."""
    groups = (group["weights"] for group in told.get("config_groups", {}).values())
    return tuple(weights["num_bits"] for weights in groups if weights["strategy"] == "channel")


def _bounded_by_words(found: Sequence[int], wanted: Sequence[int], bits: Iterable[int]) -> bool:
    """Whether a weight's shape is only the most that its words could hold: without memory compressed-tensors cannot
    read weight_shape, and takes 19 words of 3 bits for 202 codes where they are 200."""
    words = {packed_words(wanted[-1], number) * 32 // number for number in bits}
    return tuple(found[:-1]) == tuple(wanted[:-1]) and found[-1] in words


def _recast(empty: PreTrainedModel, model: PreTrainedModel, layout: Layout) -> tuple[str, ...]:
    """Stored tensors of floats for a parameter of integers, or the other way round: the loader takes both and says
    nothing. empty: the model before it was loaded, which knows the parameters that are not packed."""
    dense, loaded = dict(empty.named_parameters()), dict(model.named_parameters())
    odd: list[str] = []
    for target, stored in sources(layout, model)[0].items():
        for name, _ in stored:
            if f"{name.removesuffix('weight')}scales" in layout:
                continue  # codes with offsets, which become floats while they are loaded
            parameter = loaded.get(target) if f"{name}_scale" in layout else dense.get(target, loaded.get(target))
            if parameter is not None and layout[name][0].is_floating_point != parameter.dtype.is_floating_point:
                odd.append(name)
    return tuple(odd)


def _retyped(model: PreTrainedModel) -> tuple[str, ...]:
    """Parameters that the model's own list keeps in float32, but that were not loaded so."""
    kept = [re.compile(rf"(^|\.){name}($|\.)") for name in model._keep_in_fp32_modules_strict or ()]
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.bfloat16, torch.float16) and any(pattern.search(name) for pattern in kept)
    )


def _replaced_buffer(model: PreTrainedModel) -> str:
    """A buffer that a forward pass puts another tensor in the place of: compressed-tensors copies the new values into
    the old one, dtype included, so that CTRL's positions would stay float32 in a bfloat16 model."""
    for prefix, module in model.named_modules():
        for name in module._buffers:
            if re.search(rf"\bself\.{name} = ", _source(type(module))):
                return f"{prefix}.{name}"
    return ""


def _source(kind: type) -> str:
    """Of a class's forward pass, "" where there is none to read."""
    try:
        return inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return ""


def _built(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:
    """The model as the Auto classes build it from a config.json that is not there yet."""
    with temporary_folder("rehearsal") as folder:
        write_json(folder / "config.json", config, constants=True)
        parsed = type(checkpoint.config).from_pretrained(folder)  # reads what JSON has no number for, too
    with torch.device("meta"):
        return auto_class(parsed).from_config(parsed, trust_remote_code=checkpoint.trust_remote_code)


def _name_of(error: AttributeError) -> str:
    """The name of the module that an attribute was looked for in, from the model in whose code that happened."""
    trace, names = error.__traceback__, ""
    while trace is not None:
        model = trace.tb_frame.f_locals.get("self")
        if isinstance(model, torch.nn.Module):
            names = names or next((name for name, module in model.named_modules() if module is error.obj), "")
        trace = trace.tb_next
    return names


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """compressed-tensors draws bars and warns of names that it does not know; what matters, the rehearsal says."""
    logger = logging.getLogger("compressed_tensors")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
