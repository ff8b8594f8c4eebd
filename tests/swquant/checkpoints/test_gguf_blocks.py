"""Plain block types: to the bit what the gguf package decodes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from swquant.checkpoints.gguf_blocks import PLAIN, decode_plain


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (300, 64)])
def test_they_are_what_the_package_gives(kind: str, rows: int, blocks: int) -> None:
    """Whatever the bytes are: scales that are infinite or no numbers, too."""
    width, _ = PLAIN[kind]
    data = np.random.RandomState(rows).randint(0, 256, (rows, blocks * width)).astype(np.uint8)
    data.setflags(write=False)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    found = decode_plain(data, kind)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (32, width)
