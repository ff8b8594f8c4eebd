"""A wrong constant is an ONNX Runtime error that names value, limit and node, never a wild read.

The fast test wants the message. The slow ones run the same models, and mutated ones, in a process of its own where
AddressSanitizer and UndefinedBehaviorSanitizer watch the library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.linear_nbits import Array, attributes, initializers, one_node, random_case, session
from support.paths import PROJECT

from exporters.ops import LIBRARY
from exporters.ops.build import build_library, find_compiler


@dataclass
class Node:
    """A good node of [40, 96], 4 bits, blocks of 32, with everything an input can hold; to be spoilt."""

    constants: dict[str, Array]
    attributes: dict[str, int]


def good() -> Node:
    rng = np.random.default_rng(4)
    case = random_case(
        rng, bits=4, rows=40, cols=96, block_cols=32, zero="integer", outliers=6, channels=3, bias=True, level=4
    )
    return Node(initializers(case), attributes(case))


def attribute(name: str, value: int | None) -> Callable[[Node], None]:
    def spoil(node: Node) -> None:
        node.attributes.pop(name)
        if value is not None:
            node.attributes[name] = value

    return spoil


def value(name: str, index: int | tuple[int, ...], new: float) -> Callable[[Node], None]:
    def spoil(node: Node) -> None:
        node.constants[name] = node.constants[name].copy()
        node.constants[name][index] = new

    return spoil


def added(**constants: Array) -> Callable[[Node], None]:
    return lambda node: node.constants.update(constants)


def replaced(name: str, change: Callable[[Array], Array]) -> Callable[[Node], None]:
    def spoil(node: Node) -> None:
        node.constants[name] = change(node.constants[name])

    return spoil


def without(*names: str) -> Callable[[Node], None]:
    def spoil(node: Node) -> None:
        for name in names:
            del node.constants[name]

    return spoil


def unsorted(node: Node) -> None:
    for name in ("outlier_rows", "outlier_cols"):
        node.constants[name] = node.constants[name][::-1].copy()


def twice(node: Node) -> None:
    for name in ("outlier_rows", "outlier_cols", "outlier_deltas"):
        node.constants[name] = node.constants[name][[0, 0, 1, 2, 3, 4]]


# what is spoilt -> what the message says
HOSTILE: dict[str, tuple[Callable[[Node], None], str]] = {
    "bits 1": (attribute("bits", 1), "attribute bits is 1, allowed are 2 to 8"),
    "bits 9": (attribute("bits", 9), "attribute bits is 9, allowed are 2 to 8"),
    "bits 8": (attribute("bits", 8), "input B has shape [40, 48]; the attributes ask for [40, 96]"),
    "no bits": (attribute("bits", None), "attribute bits is missing"),
    "K 0": (attribute("K", 0), "attribute K is 0, allowed are 1 to 2147483647"),
    "K negative": (attribute("K", -96), "attribute K is -96"),
    "K of 64 bits": (attribute("K", 2**62), "attribute K is 4611686018427387904"),
    "K large": (attribute("K", 2**31 - 1), "input B has shape [40, 48]"),
    "N large": (attribute("N", 2**31 - 1), "input B has shape [40, 48]; the attributes ask for [2147483647, 48]"),
    "N smaller": (attribute("N", 39), "input B has shape [40, 48]; the attributes ask for [39, 48]"),
    "block_cols 0": (attribute("block_cols", 0), "attribute block_cols is 0"),
    "block_cols large": (attribute("block_cols", 2**31 - 1), "input B has shape [40, 48]"),
    "block_rows 0": (attribute("block_rows", 0), "attribute block_rows is 0"),
    "block_rows 2": (attribute("block_rows", 2), "input scales has shape [40, 3]; the attributes ask for [20, 3]"),
    "accuracy_level 2": (attribute("accuracy_level", 2), "attribute accuracy_level is 2, allowed are 0 and 4"),
    "B short": (replaced("B", lambda b: b[:, :-1]), "input B has shape [40, 47]; the attributes ask for [40, 48]"),
    "B flat": (replaced("B", lambda b: b.reshape(-1)), "input B has shape [1920]"),
    "scales transposed": (replaced("scales", lambda s: s.T), "input scales has shape [3, 40]"),
    "scale infinite": (value("scales", (39, 2), np.inf), "input scales holds inf at position 119"),
    "scale NaN": (value("scales", (0, 0), np.nan), "input scales holds nan at position 0"),
    "scale too large": (value("scales", (1, 0), 3e38), "at position 3 leaves the range of float32"),
    "zero points short": (replaced("zero_points", lambda z: z[:, :1]), "input zero_points has shape [40, 1]"),
    "zero points int32": (replaced("zero_points", lambda z: z.astype(np.int32)), "input zero_points has element type 6"),
    "float zero points short": (
        replaced("zero_points", lambda z: np.zeros((40, 2), np.float32)),
        "input zero_points has shape [40, 2]; the attributes ask for [40, 3]",
    ),
    "row scales beside floats": (
        added(row_scales=np.ones(40, np.float16)), "input scales has element type 1 instead of 2"
    ),
    "row scales short": (
        added(row_scales=np.ones(39, np.float16)), "input row_scales has shape [39]; the attributes ask for [40]"
    ),
    "row scale infinite": (
        added(row_scales=np.full(40, np.inf, np.float16)), "input row_scales holds inf at position 0"
    ),
    "bytes of zero points packed": (
        added(row_scales=np.ones(40, np.float16), scales=np.zeros((40, 3), np.uint8)),
        "input zero_points has shape [40, 2]; the attributes ask for [40, 3]",
    ),
    "outlier row large": (value("outlier_rows", 5, 40), "input outlier_rows holds 40 at position 5, allowed are 0 to 39"),
    "outlier row negative": (value("outlier_rows", 0, -1), "input outlier_rows holds -1 at position 0"),
    "outlier column large": (value("outlier_cols", 2, 96), "input outlier_cols holds 96 at position 2, allowed are 0 to 95"),
    "outlier column huge": (value("outlier_cols", 2, 2**31 - 1), "input outlier_cols holds 2147483647"),
    "outliers unsorted": (unsorted, "must be sorted by row and column"),
    "outlier twice": (twice, "outlier 1, ["),
    "outlier deltas short": (replaced("outlier_deltas", lambda d: d[:-1]), "input outlier_deltas has shape [5]"),
    "outlier columns short": (replaced("outlier_cols", lambda c: c[:-1]), "outlier_rows has 6 elements and outlier_cols 5"),
    "outlier delta NaN": (value("outlier_deltas", 3, np.nan), "input outlier_deltas holds nan at position 3"),
    "no outlier columns": (without("outlier_cols"), "one is missing"),
    "outlier rows of two dimensions": (replaced("outlier_rows", lambda r: r[None]), "input outlier_rows has shape [1, 6]"),
    "channel large": (value("channels", 1, 96), "input channels holds 96 at position 1, allowed are 0 to 95"),
    "channel twice": (replaced("channels", lambda c: c[[0, 0, 1]]), "twice"),
    "bias short": (replaced("bias", lambda b: b[:-1]), "input bias has shape [39]; the attributes ask for [40]"),
    "bias infinite": (value("bias", 7, -np.inf), "input bias holds -inf at position 7"),
}  # fmt: skip


def spoilt(name: str) -> bytes:
    node = good()
    HOSTILE[name][0](node)
    return one_node(node.constants, node.attributes, np.dtype(np.float32))


def refusal(library: Path, model: bytes) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - onnxruntime's exceptions have no common class
        session(library, model)
    return str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_error_names_value_limit_and_node(library: Path, name: str) -> None:
    message = refusal(library, spoilt(name))
    assert HOSTILE[name][1] in message
    assert "node 'layer.3'" in message


@pytest.mark.parametrize("name", ["B", "scales", "zero_points", "outlier_rows", "channels", "bias"])
def test_a_computed_constant_is_refused(library: Path, name: str) -> None:
    import onnx
    from onnx import helper

    node = good()
    model = onnx.load_from_string(one_node(node.constants, node.attributes, np.dtype(np.float32)))
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    model.graph.initializer.remove(tensor)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    message = refusal(library, model.SerializeToString())
    assert f"input {name} is computed by the graph; it must be a constant initializer" in message


@pytest.mark.parametrize(("shape", "text"), [((5, 95), "A has shape [5, 95]"), ((2, 97), "A has shape [2, 97]")])
def test_activations_of_another_width_are_refused(library: Path, shape: tuple[int, int], text: str) -> None:
    node = good()
    ready = session(library, one_node(node.constants, node.attributes, np.dtype(np.float32)))
    with pytest.raises(Exception, match="last dimension must be K = 96") as caught:
        ready.run(None, {"A": np.zeros(shape, np.float32)})
    assert text in str(caught.value)
    assert "layer.3" in str(caught.value)


def test_an_unknown_instruction_set_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWQUANT_CPU", "mmx")
    node = good()
    message = refusal(library, one_node(node.constants, node.attributes, np.dtype(np.float32)))
    assert "SWQUANT_CPU is mmx; known are portable, avx2 and avx512" in message


# Runs good, spoilt and randomly mutated models under the sanitizers; prints {name: message or "ran"} as JSON.
WATCHED = """
import json, sys
import numpy as np
sys.path[:0] = sys.argv[2:]
import test_hostile_models as hostile
from support.linear_nbits import one_node, session
from pathlib import Path

library = Path(sys.argv[1])
said = {}
def attempt(name, model):
    try:
        ready = session(library, model)
        for rows in (1, 9):
            ready.run(None, {"A": np.ones((rows, 96), np.float32)})
        said[name] = "ran"
    except Exception as error:
        said[name] = str(error)
for name in hostile.HOSTILE:
    attempt(name, hostile.spoilt(name))
rng = np.random.default_rng(0)
for turn in range(400):
    node = hostile.good()
    for _ in range(int(rng.integers(1, 3))):
        if rng.random() < 0.5:
            name = str(rng.choice(list(node.attributes)))
            node.attributes[name] = int(rng.choice([-1, 0, 1, 2, 3, 5, 8, 31, 33, 97, 2**31 - 1, 2**31, 2**63 - 1]))
        else:
            name = str(rng.choice(list(node.constants)))
            array = node.constants[name].copy().reshape(-1)
            array[rng.integers(len(array))] = rng.choice([0, 1, 39, 40, 95, 96, 127])
            node.constants[name] = array.reshape(node.constants[name].shape)
    attempt(f"mutation {turn}", one_node(node.constants, node.attributes, np.dtype(np.float32)))
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["portable", "avx2"])
@pytest.mark.parametrize("sanitizer", ["address", "undefined"])
def test_nothing_reads_wild(tmp_path: Path, sanitizer: str, variant: str) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler with sanitizers")
    flags = ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    library = build_library(tmp_path / LIBRARY, flags)
    # libstdc++ comes along, because the sanitizer looks for it before Python has loaded it.
    runtimes = ({"address": "libasan.so", "undefined": "libubsan.so"}[sanitizer], "libstdc++.so")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in runtimes
    ]
    environment = {
        "PATH": "/usr/bin:/bin",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "SWQUANT_CPU": variant,
        "PYTHONPATH": ":".join(path for path in sys.path if path),
        "PYTHONMALLOC": "malloc",
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(library), str(PROJECT / "tests"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:3000]
    said = json.loads(done.stdout.splitlines()[-1])
    assert all(HOSTILE[name][1] in said[name] for name in HOSTILE)
    ran = [name for name in said if said[name] == "ran"]
    assert 10 < len(ran) < len(said) - len(HOSTILE), "mutations should both run and be refused"
