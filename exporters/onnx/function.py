"""What swquant::LinearNBits means in operators that every runtime has.

Each exported file carries this as a model-local function. A stock ONNX Runtime inlines it; where our library is
registered, its kernel takes precedence. A function is looked up by its name, so a file has one, and its nodes must suit
it: `Form` says what they have. Two bodies exist:

- stock: MatMulNBits decodes and multiplies, standard operators add what is special. Fast everywhere.
- otherwise: the codes are unpacked with shifts and masks. Exact for 2 to 8 bits and every block, and slow to load: the
  runtime folds it into a float weight, so the file is small, but the memory is that of a float model.

The text is onnx's own syntax (`onnx.parser`); `@K` is the node's attribute K.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx.parser

from exporters.onnx.nodes import DOMAIN, MICROSOFT, OPERATOR

__all__ = ["INPUTS", "OPSET", "Form", "linear_function"]

OPSET = 21
INPUTS = (
    "A", "B", "scales", "zero_points", "outlier_rows", "outlier_cols", "outlier_deltas", "channels", "bias",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What all LinearNBits nodes of one file have in common. widened: scales are float16 where A is float32."""

    stock: bool
    zero_points: bool
    outliers: bool
    channels: bool = False
    widened: bool = False


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

_STOCK = """
  grid = Shape (scales)
  rest = Constant <value_ints: ints = [-1]> ()
  form = Concat <axis = 0> (grid, rest)
  blocks = Reshape (B, form)
{widen}  product = com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @bits, block_size: int = @block_cols, accuracy_level: int = @accuracy_level> ({A}, blocks, {scales}, {zero_points})
"""

# Of a constant, so the runtime does it once.
_WIDEN = "  wide_scales = Cast <to = 1> (scales)\n"

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
  scales_float = Cast <to = 1> (scales)
  scale_rows = Gather <axis = 0> (scales_float, scale_row)
  scale = Gather <axis = 1> (scale_rows, scale_col)
"""

_ZERO_POINTS = """
  zero_point_rows = Gather <axis = 0> (z_code, scale_row)
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
  scale_half = Gather <axis = 1> (scales, z_index)
  scale = Cast <to = 1> (scale_half)
"""

_CHANNELS = """
  channel_inputs = Gather <axis = -1> (A, channels)
  channel_product = MatMul (channel_inputs, transposed)
  with_channels = Add (product, channel_product)
"""


def _product(form: Form) -> str:
    """A times the decoded weight. In float arithmetic a channel taken out and added again changes nothing: only the
    stock body, which may round the activations, does it."""
    if not form.stock:
        codes = _ALL.format(p="w_", count="K") + _UNPACK.format(p="w_", packed="B")
        points = _ALL.format(p="z_", count="columns") + _UNPACK.format(p="z_", packed="zero_points") + _ZERO_POINTS
        text = _CONSTANTS + codes + _DECODE + (_COLUMNS + points if form.zero_points else _SYMMETRIC)
        return text + _WEIGHT.format(code="w_code", zero_point="zero_point") + _MULTIPLY
    product = _STOCK.format(
        A="kept" if form.channels else "A",
        widen=_WIDEN if form.widened else "",
        scales="wide_scales" if form.widened else "scales",
        zero_points="zero_points" if form.zero_points else '""',
    )
    if not form.channels:
        return product
    text = _CONSTANTS + _KEEP + product
    text += _UNPACK.format(p="c_", packed="B") + _CHANNEL_SCALES
    text += _UNPACK.format(p="z_", packed="zero_points") if form.zero_points else _SYMMETRIC
    zero_point = "z_code" if form.zero_points else "zero_point"
    return text + _WEIGHT.format(code="c_code", zero_point=zero_point) + _CHANNELS


def _body(form: Form) -> tuple[str, str]:
    """(text, name of the result)."""
    text, result = _product(form), "with_channels" if form.stock and form.channels else "product"
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
