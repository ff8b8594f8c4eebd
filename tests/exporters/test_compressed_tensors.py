"""The pack-quantized layout against the compressed-tensors package, and against itself."""

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match, match_named_modules
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import blocks_that_divide, dtypes, random_weight, small, widths
from torch import nn

from calibrationless import Channel, Flat, Group, Tile, Whole, dequantize, quantize
from exporters.compressed_tensors import (
    LOCAL_NAMES,
    Scheme,
    check_tensors,
    express,
    from_tensors,
    quantization_config,
    tensor_layout,
    to_tensors,
)

expressible = blocks_that_divide(straddling=False)


@given(expressible, widths, st.booleans(), dtypes)
@settings(max_examples=50)
def test_what_is_read_back_decodes_to_the_same_weights(case, bits, symmetric, dtype):
    block, shape = case
    quantized = quantize(random_weight(shape), block, bits, symmetric=symmetric, scale_dtype=dtype)
    read = from_tensors(to_tensors(quantized), bits)
    assert torch.equal(read.codes, quantized.codes)
    assert torch.equal(dequantize(read), dequantize(quantized))
    assert read.symmetric == symmetric
    assert read.block in (express(block, shape), Channel())


@given(expressible, widths, st.booleans(), dtypes)
@settings(max_examples=50)
def test_the_layout_is_known_before_the_weight_is(case, bits, symmetric, dtype):
    block, shape = case
    tensors = to_tensors(quantize(random_weight(shape), block, bits, symmetric=symmetric, scale_dtype=dtype))
    layout = tensor_layout(shape, block, bits, symmetric=symmetric, scale_dtype=dtype)
    assert list(layout.items()) == [(name, (tensor.dtype, tuple(tensor.shape))) for name, tensor in tensors.items()]
    assert list(layout) == [name for name in LOCAL_NAMES if name in layout]
    assert ("weight_zero_point" in layout) != symmetric
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@given(small, small, dtypes, st.sampled_from([Channel(), Whole()]))
@settings(max_examples=50)
def test_int_quantized_is_decoded_by_a_stock_loader_and_by_ours(rows, cols, dtype, block):
    quantized = quantize(random_weight((rows, cols)), block, 8, scale_dtype=dtype)
    tensors = to_tensors(quantized, int8_inputs=True)
    layout = tensor_layout((rows, cols), block, 8, symmetric=True, scale_dtype=dtype, int8_inputs=True)
    assert list(layout.items()) == [(name, (tensor.dtype, tuple(tensor.shape))) for name, tensor in tensors.items()]
    read = from_tensors(tensors, 8)
    assert torch.equal(read.codes, quantized.codes)
    assert torch.equal(dequantize(read), dequantize(quantized))
    scheme = QuantizationScheme(targets=[], weights=QuantizationArgs(num_bits=8, symmetric=True, strategy="channel"))
    assert torch.equal(IntQuantizationCompressor.decompress(tensors, scheme)["weight"], dequantize(quantized))


@pytest.mark.parametrize(
    "damaged",
    [
        {"weight": torch.zeros(4, 8)},
        {"weight": torch.zeros(4, 8, dtype=torch.int8), "weight_scale": torch.ones(4, 2)},
        {"weight": torch.zeros(8, dtype=torch.int8)},
    ],
)
def test_int_quantized_parts_that_contradict_each_other_are_refused(damaged):
    parts = {"weight": torch.zeros(4, 8, dtype=torch.int8), "weight_scale": torch.ones(4, 1)} | damaged
    with pytest.raises(ValueError, match="contradicts"):
        from_tensors(parts, 8)


@pytest.mark.parametrize("scheme", [(4, None, True), (8, 128, True), (8, None, False)])
def test_int8_inputs_are_declared_for_rows_of_symmetric_8_bit_codes_only(scheme):
    with pytest.raises(ValueError, match="declare weights alone"):
        Scheme(*scheme, int8_inputs=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("block", "shape"),
    [(Tile(3, 11), (33, 55)), (Tile(4, 7), (8, 7)), (Whole(), (37, 41)), (Flat(13), (5, 39))],
    ids=str,
)
def test_blocks_that_the_format_lacks_are_decoded_by_a_stock_loader_all_the_same(block, shape, bits, symmetric):
    quantized = quantize(random_weight(shape), block, bits, symmetric=symmetric)
    target = express(block, shape)
    grouped = isinstance(target, Group)
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if grouped else "channel",
        group_size=target.size if grouped else None,
    )
    stock = PackedQuantizationCompressor.decompress(
        to_tensors(quantized), QuantizationScheme(targets=[], weights=weights)
    )
    assert torch.equal(stock["weight"], dequantize(quantized))


@pytest.mark.parametrize(
    ("block", "target"),
    [
        (Group(8), Group(8)),
        (Channel(), Channel()),
        (Whole(), Channel()),
        (Tile(2, 8), Group(8)),
        (Tile(2, 24), Channel()),
        (Flat(24), Channel()),
        (Flat(48), Channel()),
        (Flat(8), Group(8)),
        (Flat(16), None),
        (Flat(36), None),
    ],
    ids=str,
)
def test_a_block_is_expressed_as_a_group_or_a_channel_where_one_exists(block, target):
    assert express(block, (6, 24)) == target


@pytest.mark.parametrize("size", [16, 36])
def test_a_flat_block_that_straddles_rows_is_refused(size):
    with pytest.raises(ValueError, match=rf"flat:{size} straddles the rows of a \[6, 24\]"):
        to_tensors(quantize(random_weight((6, 24)), Flat(size), 4))
    with pytest.raises(ValueError, match=rf"flat:{size} straddles the rows of a \[6, 24\]"):
        tensor_layout((6, 24), Flat(size), 4, symmetric=True, scale_dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("weight_shape", torch.tensor([4, 31])),  # does not divide into two groups
        ("weight_shape", torch.tensor([4, 34])),  # needs another word
        ("weight_shape", torch.tensor([5, 32])),
        ("weight_shape", torch.tensor([0, 32])),
        ("weight_shape", torch.tensor([4, -32])),
        ("weight_shape", torch.tensor([4, 2**62])),
        ("weight_shape", torch.tensor([4, 32, 1])),
        ("weight_shape", torch.tensor(4)),
        ("weight_shape", torch.tensor([4.5, 32.0])),
        ("weight_packed", torch.zeros(3, 4, dtype=torch.int32)),
        ("weight_packed", torch.zeros(4, 5, dtype=torch.int32)),
        ("weight_packed", torch.zeros(4, 4, dtype=torch.int64)),
        ("weight_packed", torch.tensor(4, dtype=torch.int32)),
        ("weight_scale", torch.ones(4)),
        ("weight_scale", torch.ones(3, 2)),
        ("weight_scale", torch.ones(4, 3)),
        ("weight_scale", torch.ones(4, 0)),
        ("weight_zero_point", torch.zeros(1, 1, dtype=torch.int32)),
        ("weight_zero_point", torch.zeros(2, 2, dtype=torch.int32)),
        ("weight_zero_point", torch.zeros(2, dtype=torch.int32)),
        ("weight_zero_point", torch.zeros(1, 2, dtype=torch.uint8)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(list(value.shape)),
)
def test_tensors_that_contradict_each_other_are_refused(name, replacement):
    tensors = to_tensors(quantize(random_weight((4, 32)), Group(16), 4, symmetric=False))
    with pytest.raises(ValueError, match=r"[\d]"):  # the numbers are in the message
        from_tensors({**tensors, name: replacement}, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("int8", [False, True])
def test_scales_that_are_no_numbers_are_refused(value, int8):
    quantized = quantize(random_weight((4, 32)), Channel(), 8)
    tensors = to_tensors(quantized, int8_inputs=int8)
    tensors["weight_scale"][2, 0] = value
    with pytest.raises(ValueError, match="weight_scale holds a NaN or infinite value"):
        from_tensors(tensors, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_g_idx": torch.zeros(32)}, "are not the parts of one weight"),
        ({"weight": torch.zeros(4, 32, dtype=torch.int8)}, "are not the parts of one weight"),
        ({"weight_scale": torch.ones(4, 2, dtype=torch.int32)}, "weight_scale is of torch.int32"),
    ],
)
def test_parts_that_no_weight_has_are_refused(change, message):
    tensors = to_tensors(quantize(random_weight((4, 32)), Group(16), 4))
    with pytest.raises(ValueError, match=message):
        from_tensors({**tensors, **change}, 4)
    with pytest.raises(ValueError, match=r"its shape is \[4, 32\], the manifest says \[32, 4\]"):
        from_tensors(tensors, 4, [32, 4])
    with pytest.raises(ValueError, match="bits 9 is outside"):
        from_tensors(tensors, 9)


def test_codes_need_not_be_read_to_be_checked():
    tensors = to_tensors(quantize(random_weight((4, 32)), Group(16), 4, symmetric=False))
    there = ("weight_scale", "weight_shape")
    check_tensors({name: part if name in there else part.to("meta") for name, part in tensors.items()}, 4, [4, 32])


LINEARS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qko"]
LINEARS += [f"model.layers.{layer}.{mlp}.down_proj" for layer in range(12) for mlp in ("mlp", "shared_mlp")]
LINEARS += [
    f"model.layers.{layer}.mlp.experts.{expert}.w{n}" for layer in range(2) for expert in (0, 1, 10) for n in (2, 22)
]
LINEARS += ["lm_head", "model.embed_out", "vision.blocks.0.mlp.down_proj", "dense.0", "dense.1"]
SCHEMES = [Scheme(4, 64, True), Scheme(4, None, True), Scheme(8, 32, False)]


def tree(names: list[str]) -> nn.Module:
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        module = root
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.add_module(last, nn.Linear(1, 1))
    return root


def assert_targets_match_exactly(schemes: dict[str, Scheme]) -> QuantizationConfig:
    dense = [name for name in LINEARS if name not in schemes]
    config = QuantizationConfig.model_validate(quantization_config(schemes, dense, "0.20.0"))
    groups = list(config.config_groups.values())
    assert len(groups) == len(set(schemes.values()))
    for group in groups:
        weights = group.weights
        scheme = Scheme(weights.num_bits, weights.group_size, weights.symmetric)
        matched = {name for name, _ in match_named_modules(tree(LINEARS), group.targets)}
        assert matched == {name for name in schemes if schemes[name] == scheme}
    assert {name for name, _ in match_named_modules(tree(LINEARS), config.ignore)} == set(dense)
    return config


@given(st.lists(st.sampled_from([None, *SCHEMES]), min_size=len(LINEARS), max_size=len(LINEARS)))
@settings(max_examples=30)
def test_every_module_is_matched_by_its_own_scheme_and_no_other(choice):
    assert_targets_match_exactly({name: scheme for name, scheme in zip(LINEARS, choice, strict=True) if scheme})


@given(
    st.fixed_dictionaries(
        {kind: st.sampled_from([None, *SCHEMES]) for kind in ("q_proj", "k_proj", "mlp.down_proj", "w2", "w22", "head")}
    )
)
@settings(max_examples=30)
def test_a_scheme_for_each_kind_of_layer_is_matched_exactly(choice):
    chosen = {name: scheme for kind, scheme in choice.items() for name in LINEARS if name.endswith(kind) and scheme}
    assert_targets_match_exactly(chosen)


def test_one_pattern_for_each_kind_survives_a_loaders_prefixes():
    schemes = {
        name: SCHEMES[0] for name in LINEARS if name.startswith(("model.layers", "vision")) and "shared" not in name
    }
    config = assert_targets_match_exactly(schemes)
    targets = config.config_groups["group_0"].targets
    assert len(targets) == 6
    assert all(target.startswith("re:") for target in targets)
    for name in schemes:
        for loaded in (name.removeprefix("model."), name.replace("model.", "model.language_model.", 1)):
            assert is_match(loaded, nn.Linear(1, 1), targets)
        assert not is_match(name + ".lora_A", nn.Linear(1, 1), targets)


def test_the_config_declares_what_the_tensors_are():
    config = quantization_config({"a.0.down": Scheme(3, None, False)}, ["lm_head"], "0.20.0")
    assert (config["quant_method"], config["format"], config["version"]) == (
        "compressed-tensors",
        "pack-quantized",
        "0.20.0",
    )
    weights = QuantizationConfig.model_validate(config).config_groups["group_0"].weights
    assert (weights.num_bits, weights.type, weights.strategy, weights.symmetric) == (3, "int", "channel", False)
    assert config["ignore"] == ["lm_head"]
    assert str(Scheme(3, None, False)) == "int3 channel asymmetric"
