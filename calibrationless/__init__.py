"""Algorithms on tensors: blocks, rounding, clipping, detection. torch only; no files, no models, no printing."""

from calibrationless.activations import (
    activation_codes,
    activation_scale,
    massive_channels,
    round_activations,
    static_scale,
)
from calibrationless.allocation import allocate
from calibrationless.blocks import (
    Block,
    Channel,
    Flat,
    Group,
    Tensor,
    Tile,
    block_elements,
    block_index,
    columns,
    divides,
    expand,
    fit,
    from_blocks,
    parse_block,
    scale_shape,
    to_blocks,
)
from calibrationless.clipping import RULES, Clip, clip_threshold, parse_clip
from calibrationless.cost import WeightError, measure, worst
from calibrationless.feedback import damping_for, feed_back, inverse_factor
from calibrationless.patches import Outliers, check_outliers, restore
from calibrationless.pieces import for_pieces
from calibrationless.probe import run_probe
from calibrationless.quantized import MAX_BITS, MIN_BITS, QuantizedTensor, check_bits, dequantize
from calibrationless.records import Contribution, LinearRecord, Peak, Probe, Residual, Scalar, Watch
from calibrationless.rounding import choose_scale, quantize, round_to_codes
from calibrationless.scaling import scaling_exponents
from calibrationless.search import block_importance, search_scale
from calibrationless.super_weights import Detection, LayerSpike, SuperActivation, SuperWeight, detect

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "RULES",
    "Block",
    "Channel",
    "Clip",
    "Contribution",
    "Detection",
    "Flat",
    "Group",
    "LayerSpike",
    "LinearRecord",
    "Outliers",
    "Peak",
    "Probe",
    "QuantizedTensor",
    "Residual",
    "Scalar",
    "SuperActivation",
    "SuperWeight",
    "Tensor",
    "Tile",
    "Watch",
    "WeightError",
    "activation_codes",
    "activation_scale",
    "allocate",
    "block_elements",
    "block_importance",
    "block_index",
    "check_bits",
    "check_outliers",
    "choose_scale",
    "clip_threshold",
    "columns",
    "damping_for",
    "dequantize",
    "detect",
    "divides",
    "expand",
    "feed_back",
    "fit",
    "for_pieces",
    "from_blocks",
    "inverse_factor",
    "massive_channels",
    "measure",
    "parse_block",
    "parse_clip",
    "quantize",
    "restore",
    "round_activations",
    "round_to_codes",
    "run_probe",
    "scale_shape",
    "scaling_exponents",
    "search_scale",
    "static_scale",
    "to_blocks",
    "worst",
]
