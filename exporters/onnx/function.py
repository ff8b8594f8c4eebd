"""What swquant::LinearNBits means in operators that every runtime has.

Each exported file carries this as a model-local function. A stock ONNX Runtime inlines it; where our library is
registered, its kernel takes precedence. A function is looked up by its name, so a file has one, and its nodes must suit
it: `Form` says what they have. Two bodies exist:

- stock: MatMulNBits decodes and multiplies, standard operators add what is special. Fast everywhere. A zero point
  between two codes, which few kernels of it know, is an offset of the whole block beside the usual one: it is added as
  the product of the block's summed inputs and its offset.
- otherwise: the codes are unpacked with shifts and masks. Exact for 2 to 8 bits and every block, and slow to load: the
  runtime folds it into a float weight, so the file is small, but the memory is that of a float model.

The text is onnx's own syntax (`onnx.parser`); `@K` is the node's attribute K.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx.parser

from calibrationless import compact_steps
from exporters.onnx.nodes import DOMAIN, MICROSOFT, OPERATOR

__all__ = ["INPUTS", "OPSET", "Form", "linear_function"]

OPSET = 21
INPUTS = (
    "A", "B", "scales", "zero_points", "outlier_rows", "outlier_cols", "outlier_deltas", "channels", "bias",
    "row_scales",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What all LinearNBits nodes of one file have in common. zero_points: what they are, "" where there are none,
    "codes", "floats", or "bytes" with scales of a byte, too. widened: scales are float16 where A is float32. ragged: a
    last block hangs over the end of a row."""

    stock: bool
    zero_points: str
    outliers: bool
    channels: bool = False
    widened: bool = False
    ragged: bool = False


# A with the channels at zero. Everything but the last line is constant, and folded when a runtime loads the file.
_KEEP = """
  c_index = Cast <to = 7> (channels)
  off_on = Constant <value_floats: floats = [0.0, 1.0]> ()
  unit = Constant <value_float: float = 1.0> ()
  first = Constant <value_ints: ints = [0]> ()
  picks = OneHot <axis = -1> (c_index, K, off_on)
  picked = ReduceSum <keepdims = 0> (picks, first)
  mask_float = Sub (unit, picked)
  mask = CastLike (mask_float, A)
  kept = Mul (A, mask)
"""

# Scale and zero point of a block from a byte each; all of it is constant.
_BYTES = """
  steps = Constant <value_floats: floats = [{steps}]> ()
  exponents = Cast <to = 7> (scales)
  factors = Gather <axis = 0> (steps, exponents)
  row_floats = Cast <to = 1> (row_scales)
  second = Constant <value_ints: ints = [1]> ()
  row_column = Unsqueeze (row_floats, second)
  scales_float = Mul (factors, row_column)
  zero_bytes = Cast <to = 1> (zero_points)
  power_float = Cast <to = 1> (power)
  of_byte = Constant <value_float: float = 0.00390625> ()
  zero_unit = Mul (power_float, of_byte)
  zeros_float = Mul (zero_bytes, zero_unit)
"""

_FLOATS = """
  scales_float = Cast <to = 1> (scales)
  zeros_float = Cast <to = 1> (zero_points)
"""

# The last block may hang over.
_PAD = """
  all_columns = Mul (block_count, block_length)
  given_columns = Unsqueeze (K, no_columns)
  missing_columns = Sub (all_columns, given_columns)
  pads = Concat <axis = 0> (no_columns, missing_columns)
  padded = Pad (A, pads, "", last_axis)
"""

# A summed over each block, times what the block's zero point is away from the usual one.
_BLOCK_SUMS = """
  last_axis = Constant <value_ints: ints = [-1]> ()
  block_count = Shape <start = 1> (scales)
  no_columns = Constant <value_ints: ints = [0]> ()
  block_length = Unsqueeze (block_cols, no_columns)
{pad}  lead = Shape <end = -1> (A)
  cut = Concat <axis = 0> (lead, block_count, block_length)
  in_blocks = Reshape ({A}, cut)
  block_sums = ReduceSum <keepdims = 0> (in_blocks, last_axis)
  half_power_int = Div (power, two)
  usual = Cast <to = 1> (half_power_int)
  away = Sub (usual, zeros_float)
  offsets_float = Mul (away, scales_float)
  offsets_turned = Transpose <perm = [1, 0]> (offsets_float)
  offsets = CastLike (offsets_turned, A)
  moved = MatMul (block_sums, offsets)
  {result} = Add ({product}, moved)
"""

_STOCK = """
  grid = Shape (scales)
  rest = Constant <value_ints: ints = [-1]> ()
  form = Concat <axis = 0> (grid, rest)
  blocks = Reshape (B, form)
  product = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @bits, block_size: int = @block_cols, accuracy_level: int = @accuracy_level> ({A}, blocks, {scales}, {zero_points})
"""

# Of a constant, so the runtime does it once.
_WIDEN = "  wide_scales = Cast <to = 1> (scales)\n"
_CAST_SCALES = "  cast_scales = CastLike (scales_float, A)\n"

_CONSTANTS = """
  K = Constant <value_int: int = @K> ()
  block_cols = Constant <value_int: int = @block_cols> ()
  bits = Constant <value_int: int = @bits> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  two = Constant <value_int: int = 2> ()
  eight = Constant <value_int: int = 8> ()
  power = Pow (two, bits)
  largest = Sub (power, one)
  mask32 = Cast <to = 12> (largest)
  eight32 = Cast <to = 12> (eight)
"""

_ALL = """
  {p}index = Range (zero, {count}, one)
"""

# Code {p}index of each row: the 16 bits that begin in byte index * bits / 8, shifted down by what is left, masked.
_UNPACK = """
  {p}bit = Mul ({p}index, bits)
  {p}byte = Div ({p}bit, eight)
  {p}offset = Mod ({p}bit, eight)
  {p}shift = Cast <to = 12> ({p}offset)
  {p}width = Shape <start = 1> ({packed})
  {p}last = Sub ({p}width, one)
  {p}following = Add ({p}byte, one)
  {p}next = Min ({p}following, {p}last)
  {p}low8 = Gather <axis = 1> ({packed}, {p}byte)
  {p}high8 = Gather <axis = 1> ({packed}, {p}next)
  {p}low = Cast <to = 12> ({p}low8)
  {p}high = Cast <to = 12> ({p}high8)
  {p}raised = BitShift <direction = "LEFT"> ({p}high, eight32)
  {p}word = BitwiseOr ({p}low, {p}raised)
  {p}lowered = BitShift <direction = "RIGHT"> ({p}word, {p}shift)
  {p}code32 = BitwiseAnd ({p}lowered, mask32)
  {p}code = Cast <to = 1> ({p}code32)
"""

_COLUMNS = """
  scale_shape = Shape <start = 1> (scales)
  columns = Squeeze (scale_shape)
"""

_DECODE = """
  block_rows = Constant <value_int: int = @block_rows> ()
  N = Constant <value_int: int = @N> ()
  row = Range (zero, N, one)
  scale_row = Div (row, block_rows)
  scale_col = Div (w_index, block_cols)
  scale_rows = Gather <axis = 0> (scales_float, scale_row)
  scale = Gather <axis = 1> (scale_rows, scale_col)
"""

_SCALES_FLOAT = """
  scales_float = Cast <to = 1> (scales)
"""

_ZERO_POINTS = """
  zero_point_rows = Gather <axis = 0> ({zeros}, scale_row)
  zero_point = Gather <axis = 1> (zero_point_rows, scale_col)
"""

_SYMMETRIC = """
  half_power = Div (power, two)
  zero_point = Cast <to = 1> (half_power)
"""

_WEIGHT = """
  centred = Sub ({code}, {zero_point})
  decoded = Mul (centred, scale)
  weight = CastLike (decoded, A)
  transposed = Transpose <perm = [1, 0]> (weight)
"""

_MULTIPLY = """
  product = MatMul (A, transposed)
"""

# In float32, also because the runtime cannot add with ScatterElements in half precision on a CPU.
_OUTLIERS = """
  outlier_inputs = Gather <axis = -1> (A, outlier_cols)
  outlier_floats = Cast <to = 1> (outlier_inputs)
  missing = Mul (outlier_floats, outlier_deltas)
  missing_shape = Shape (missing)
  outlier_rows64 = Cast <to = 7> (outlier_rows)
  places = Expand (outlier_rows64, missing_shape)
  product_floats = Cast <to = 1> ({product})
  restored = ScatterElements <axis = -1, reduction = "add"> (product_floats, places, missing)
  with_outliers = CastLike (restored, A)
"""

# What the channels' codes decode to is constant, too.
_CHANNEL_SCALES = """
  z_index = Div (c_index, block_cols)
  scale_half = Gather <axis = 1> ({scales}, z_index)
  scale = Cast <to = 1> (scale_half)
"""

_CHANNELS = """
  channel_inputs = Gather <axis = -1> (A, channels)
  channel_product = MatMul (channel_inputs, transposed)
  with_channels = Add (product, channel_product)
"""


def _decoded(form: Form) -> str:
    """A times the weight that is decoded here. A channel taken out and added again would change nothing."""
    text = _CONSTANTS + _numbers(form) + _ALL.format(p="w_", count="K") + _UNPACK.format(p="w_", packed="B") + _DECODE
    if form.zero_points == "codes":
        text += _COLUMNS + _ALL.format(p="z_", count="columns") + _UNPACK.format(p="z_", packed="zero_points")
    zeros = "z_code" if form.zero_points == "codes" else "zeros_float"
    text += _ZERO_POINTS.format(zeros=zeros) if form.zero_points else _SYMMETRIC
    return text + _WEIGHT.format(code="w_code", zero_point="zero_point") + _MULTIPLY


def _numbers(form: Form) -> str:
    """Scales, and zero points that are no codes, as floats."""
    if form.zero_points == "bytes":
        return _BYTES.format(steps=", ".join(repr(step) for step in compact_steps().tolist()))
    return _FLOATS if form.zero_points == "floats" else _SCALES_FLOAT


def _product(form: Form) -> tuple[str, str]:
    """(text, name) of A times the weight, without outliers."""
    if not form.stock:
        return _decoded(form), "product"
    real = form.zero_points not in ("", "codes")
    text = _CONSTANTS if real or form.channels else ""
    text += _numbers(form) + _CAST_SCALES if real else _WIDEN if form.widened else ""
    text += _KEEP if form.channels else ""
    scales = "cast_scales" if real else "wide_scales" if form.widened else "scales"
    text += _STOCK.format(
        A="kept" if form.channels else "A",
        scales=scales,
        zero_points="zero_points" if form.zero_points == "codes" else '""',
    )
    result = "product"
    if form.channels:
        text += _UNPACK.format(p="c_", packed="B") + _CHANNEL_SCALES.format(scales=scales)
        text += _UNPACK.format(p="z_", packed="zero_points") if form.zero_points == "codes" else _SYMMETRIC
        zero_point = "z_code" if form.zero_points == "codes" else "zero_point"
        text += _WEIGHT.format(code="c_code", zero_point=zero_point) + _CHANNELS
        result = "with_channels"
    if real:
        text += _BLOCK_SUMS.format(
            pad=_PAD if form.ragged else "", A="padded" if form.ragged else "A", product=result, result="with_offsets"
        )
        result = "with_offsets"
    return text, result


def _body(form: Form) -> tuple[str, str]:
    """(text, name of the result)."""
    text, result = _product(form)
    return (text + _OUTLIERS.format(product=result), "with_outliers") if form.outliers else (text, result)


def linear_function(form: Form) -> onnx.FunctionProto:
    """The function swquant::LinearNBits for a file whose nodes have this form."""
    text, result = _body(form)
    lines = "\n".join(line for line in text.splitlines() if line.strip())
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{MICROSOFT}" : 1]>\n'
        f"{OPERATOR} <K, N, bits, block_rows, block_cols, accuracy_level> ({', '.join(INPUTS)}) => (Y)\n"
        f"{{\n{lines}\n  Y = Identity ({result})\n}}"
    )
