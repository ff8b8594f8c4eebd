"""transformers learns of swquant: after `import swquant.hf`, `from_pretrained` restores what it would leave out.

    import swquant.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("model-w4-b128")       # as swquant.load, weight for weight
    model = AutoModelForCausalLM.from_pretrained("model", quantization_config=swquant.hf.SwquantConfig(bits=4))

Checkpoints are stored for quantizers that transformers has (`compressed-tensors`, `metal`), so that everybody can read
them, and its register takes no second one of a name. Importing this module therefore puts a subclass in the place of
each. Where the folder has a manifest of ours the subclass reads every weight through `CompressedCheckpoint`: decoded,
patches laid over, hashes compared; of other folders it is the class that it was. The model is dense, and its inputs are
rounded where the manifest says so. Experts are fused by transformers' own conversions, from weights that were decoded.

A `SwquantConfig` compresses into a temporary folder, which is then loaded like any checkpoint.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.quantization_config import QuantizationConfigMixin

from exporters.errors import SwquantError
from swquant.api import compress
from swquant.checkpoints.compressed import CompressedCheckpoint
from swquant.checkpoints.manifest import MANIFEST
from swquant.checkpoints.open import open_checkpoint
from swquant.compress.options import CompressOptions
from swquant.models.architecture import describe
from swquant.models.rounded_inputs import round_inputs
from swquant.pr_moe import register as register_mixtures

__all__ = ["SwquantConfig", "SwquantQuantizer", "register", "unregister"]

_METHOD = "swquant"
_REPLACED = ("compressed-tensors", "metal")  # the quantizers that checkpoints are stored for
# What the layouts store for a weight. The parts only say that it is there: what is laid into the model, the checkpoint
# reads.
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "scales", "qbiases", "weight")


class _Decoded(ConversionOps):
    """The operation of a conversion that has its tensors decoded already."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        return input_dict


class _Reader:
    """The checkpoint, one for all copies that transformers makes of a conversion."""

    def __init__(self, checkpoint: CompressedCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.unread = set(checkpoint.quantized_names)

    def __deepcopy__(self, _: Any) -> _Reader:
        return self

    def read(self, part: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The weight that a stored part belongs to."""
        name = _weight_of(part)
        self.unread.discard(name)
        return self.checkpoint.read(name).to(device=device, dtype=dtype)


def _weight_of(part: str) -> str:
    """The stored name of the tensor that a part belongs to: another's name that only ends like one is its own."""
    module, _, last = part.rpartition(".")
    return f"{module}.weight" if last in _PARTS else part


class _Restored(WeightConverter):
    """A conversion of transformers', its own or that of a mixture, that starts from decoded weights.

    reader: the checkpoint. stored: pattern -> names of the parts that matched it, in the order of the checkpoint.
    """

    __slots__ = ("dtype", "reader", "stored")

    def __init__(
        self,
        source_patterns: list[str],
        target_patterns: list[str],
        operations: list[ConversionOps],
        force_cpu: bool = False,
        *,
        reader: _Reader,
    ) -> None:
        super().__init__(source_patterns, target_patterns, operations, force_cpu)
        self.reader, self.dtype = reader, torch.float32
        self.stored: dict[str, list[str]] = {}

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.stored.setdefault(source_pattern, []).append(source_key)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: LoadStateDictInfo | None = None,
    ) -> Any:
        self.dtype = model.get_parameter_or_buffer(layer_name).dtype
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)

    def materialize_tensors(self) -> dict[str, list[torch.Tensor]]:
        parts = super().materialize_tensors()
        device = next(iter(parts.values()))[0].device
        weights: dict[str, list[torch.Tensor]] = {}
        done: set[str] = set()
        for pattern, names in self.stored.items():
            new = [name for name in names if _weight_of(name) not in done]
            if new:
                stem = pattern.rpartition(".")[0]
                done |= {_weight_of(name) for name in new}
                weights[f"{stem}.weight" if stem else "weight"] = [
                    self.reader.read(name, self.dtype, device) for name in new
                ]
        return weights


class SwquantQuantizer(HfQuantizer):
    """What the quantizers below add to transformers'. `checkpoint` is None for folders that swquant did not write."""

    checkpoint: CompressedCheckpoint | None = None
    _reader: _Reader | None = None
    _temporary: tempfile.TemporaryDirectory[str] | None = None

    def update_device_map(self, device_map: Any) -> Any:
        """Without one, the quantizer for Apple's kernels would take a device that others have not."""
        chosen = super().update_device_map(device_map)
        return chosen if device_map is not None or torch.backends.mps.is_available() else None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **how: Any) -> Any:
        folder = _folder_of(model, how["checkpoint_files"])
        if folder is None:
            return super()._process_model_before_weight_loading(model, **how)
        self._read_from(folder, model)
        return model

    def _read_from(self, folder: Path, model: PreTrainedModel) -> None:
        trusted = type(model).__module__.startswith("transformers_modules")  # the user said so to transformers
        self.checkpoint = CompressedCheckpoint(folder, trust_remote_code=trusted)
        config: Any = self.quantization_config
        config.dequantize = True  # modules stay what they are, and the model forgets how it was stored

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Conversions of the model's own read decoded weights, too."""
        if self.checkpoint is None:
            return super().update_weight_conversions(weight_conversions, model)
        reader = self._reader = _Reader(self.checkpoint)
        updated = [_restored(conversion, reader) for conversion in weight_conversions]
        return [*updated, _Restored(list(_PARTS), ["weight"], [_Decoded()], reader=reader)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **how: Any) -> Any:
        if self.checkpoint is None:
            return super()._process_model_after_weight_loading(model, **how)
        with self.checkpoint as checkpoint:
            if self._reader is not None and self._reader.unread:
                name = min(self._reader.unread)
                raise SwquantError(
                    f"{checkpoint.name}: {type(model).__name__} has no place for {name}; use swquant.load"
                )
            if checkpoint.manifest["activations"] is not None:
                round_inputs(model, checkpoint.manifest, describe(checkpoint))
        if hasattr(model.config, "swquant"):  # it points at files that a saved model does not have
            del model.config.swquant
        setattr(model, "_weight_conversions", None)  # noqa: B010 - of reading, which must not be turned around on saving
        self.checkpoint = None
        if self._temporary is not None:
            self._temporary.cleanup()
        return model


def _restored(conversion: Any, reader: _Reader) -> Any:
    """A conversion of the model's own, from decoded weights if it takes any."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
    if not all(source.endswith(".weight") for source in sources):
        return conversion
    parts = [f"{source.removesuffix('weight')}{part}" for source in sources for part in _PARTS]
    made = _Restored(parts, targets, list(conversion.operations), conversion.force_cpu, reader=reader)
    made.scope_prefix, made.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return made


def _folder_of(model: PreTrainedModel, files: list[str] | None) -> Path | None:
    """The folder of a checkpoint of ours, None of another's. Of one on the hub, what transformers would not fetch is
    fetched from the same commit. Raises SwquantError where the manifest is missing."""
    if not files:
        return None
    folder = Path(files[0]).parent
    if (folder / MANIFEST).is_file():
        return folder
    said = getattr(model.config, "swquant", None)
    if not isinstance(said, dict):
        return None
    source = str(model.config.name_or_path)
    names = [name for name in (said.get("manifest"), said.get("sidecar")) if isinstance(name, str)]
    commit = getattr(model.config, "_commit_hash", None)
    for name in names if not os.path.isdir(source) else ():
        cached_file(source, name, revision=commit, _raise_exceptions_for_missing_entries=False)
    if not (folder / MANIFEST).is_file():
        raise SwquantError(f"{source}: no {MANIFEST}, though config.json names it; fetch it again")
    return folder


class SwquantConfig(QuantizationConfigMixin):
    """Options of `swquant.compress` for `from_pretrained(…, quantization_config=…)`: bits, block, preset, …"""

    def __init__(self, **options: Any) -> None:
        self.quant_method: Any = _METHOD
        self.dequantize = True
        known = {item.name for item in fields(CompressOptions)}
        given = {name: value for name, value in options.items() if name not in ("quant_method", "dequantize")}
        if unknown := sorted(set(given) - known):
            raise SwquantError(f"SwquantConfig has no option {unknown[0]!r}; those of swquant.compress are known")
        CompressOptions(**given)  # raises for nonsense now
        self.options = given

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"quant_method": _METHOD, **self.options}


class _OnTheFly(SwquantQuantizer):
    """Compresses what from_pretrained was asked for, then loads that."""

    def update_attn_implementation(self, config: Any) -> Any:
        """The last that is asked before the model is built: from then on new tensors have no memory."""
        if not config.name_or_path:
            raise SwquantError("SwquantConfig: the configuration does not say which model it is of; leave config out")
        self._temporary = tempfile.TemporaryDirectory(prefix="swquant-")
        options: Any = self.quantization_config
        trusted, commit = (
            type(config).__module__.startswith("transformers_modules"),
            getattr(config, "_commit_hash", None),
        )
        with open_checkpoint(str(config.name_or_path), revision=commit, trust_remote_code=trusted) as source:
            folder = source.folder  # of one on the hub, with all that transformers did not fetch
        out = Path(self._temporary.name) / "out"
        compress(folder, out, CompressOptions(**options.options), trust_remote_code=trusted)
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **how: Any) -> Any:
        assert self._temporary is not None
        files: list[str] = how["checkpoint_files"]
        out = Path(self._temporary.name) / "out"
        self._read_from(out, model)
        self.pre_quantized = True
        files[:] = sorted(str(path) for path in out.glob("*.safetensors"))  # the list that is loaded from
        return model

    def is_serializable(self) -> bool:
        """Of a dense model, as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Its weights are dense."""
        return True


def _restoring(stock: Any) -> Any:
    """A class: a quantizer of transformers' that knows our folders."""
    return type(f"Restoring{stock.__name__}", (SwquantQuantizer, stock), {"__doc__": stock.__doc__})


_STOCK: dict[str, Any] = {}  # what stood in the register before


def register() -> None:
    """Tell transformers; importing this module does. Mixtures made by `swquant moe` are known from then on, too."""
    register_mixtures()
    if _STOCK:
        return
    for name in _REPLACED:
        _STOCK[name] = auto.AUTO_QUANTIZER_MAPPING[name]
        auto.AUTO_QUANTIZER_MAPPING[name] = _restoring(_STOCK[name])
    auto.register_quantizer(_METHOD)(_OnTheFly)
    auto.register_quantization_config(_METHOD)(SwquantConfig)


def unregister() -> None:
    """Take it back: transformers loads checkpoints as those do who have no swquant."""
    if _STOCK:
        auto.AUTO_QUANTIZER_MAPPING.update(_STOCK)
        del auto.AUTO_QUANTIZER_MAPPING[_METHOD], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD]
        _STOCK.clear()


register()
