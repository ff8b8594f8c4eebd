"""Our files against the safetensors package, and the reader against files that lie."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from exporters.errors import CheckpointError
from exporters.safetensors_file import FileRecord, SafetensorsReader, SafetensorsWriter, dtype_name

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0))
    return (values > 0) if dtype is torch.bool else values.abs().to(dtype) if dtype is torch.uint8 else values.to(dtype)


def everything() -> dict[str, torch.Tensor]:
    """Every dtype as a matrix, a vector of odd length, a scalar and an empty tensor."""
    shapes = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 4)}
    return {f"{dtype}.{kind}": tensor_of(dtype, shape) for dtype in DTYPES for kind, shape in shapes.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> FileRecord:
    writer = SafetensorsWriter(
        path, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()], metadata
    )
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    return writer.finish()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.flatten().view(torch.uint8).tolist() == expected.flatten().view(torch.uint8).tolist()


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    path, tensors = tmp_path / "ours.safetensors", everything()
    write(path, tensors, {"format": "pt", "ünï": "çödé"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "ünï": "çödé"}


def test_we_read_what_the_safetensors_package_writes(tmp_path):
    path, tensors = tmp_path / "theirs.safetensors", everything()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with SafetensorsReader(path) as reader:
        assert reader.entries.keys() == tensors.keys()
        assert reader.metadata == {"format": "pt"}
        for name, tensor in reversed(tensors.items()):
            assert_same(reader.read(name), tensor)
            assert reader.read_bytes(name).tolist() == tensor.flatten().view(torch.uint8).tolist()
            assert (reader.entries[name].dtype, reader.entries[name].shape) == (tensor.dtype, tuple(tensor.shape))


def test_a_file_without_tensors_is_written_and_read(tmp_path):
    write(tmp_path / "none", {})
    assert safetensors.torch.load_file(tmp_path / "none") == {}
    assert SafetensorsReader(tmp_path / "none").entries == {}


def test_a_tensor_that_is_not_contiguous_is_written_in_order(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    write(tmp_path / "file", {"t": tensor})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "file")["t"], tensor)


def test_the_record_holds_the_size_and_checksums_of_the_file(tmp_path):
    path, tensors = tmp_path / "file", everything()
    record = write(path, tensors)
    content = path.read_bytes()
    assert (record.nbytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert list(record.tensors) == list(tensors)
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    with SafetensorsReader(path) as reader:
        assert reader.header_sha256 == hashlib.sha256(content[: 8 + length]).hexdigest()
        for name, digest in record.tensors.items():
            assert digest == hashlib.sha256(bytes(reader.read_bytes(name).tolist())).hexdigest()


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "no tensor is an object": ({"a": []}, "offsets for a"),
    "a field is missing": ({"a": {"dtype": "F32", "shape": [2]}}, "offsets for a"),
    "the metadata is a list": ({"__metadata__": [1], "a": entry()}, "metadata"),
    "an unknown dtype": ({"a": entry(dtype="F33")}, "unknown dtype 'F33'.*F32"),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, "dtype"),
    "a dtype that is a number": ({"a": entry(dtype=32)}, "unknown dtype 32"),
    "a shape that is a number": ({"a": entry(shape=2)}, "shape 2"),
    "a negative dimension": ({"a": entry(shape=[-2])}, r"shape \[-2\]"),
    "a dimension that is true": ({"a": entry(shape=[2, True])}, r"shape \[2, True\]"),
    "a dimension that is a fraction": ({"a": entry(shape=[2.0])}, r"shape \[2.0\]"),
    "a dimension that is text": ({"a": entry(shape=["2"])}, "shape"),
    "a dimension beyond 64 bits": ({"a": entry(shape=[2**63])}, "shape"),
    "a product beyond 64 bits": ({"a": entry(shape=[2**62, 4])}, "has the shape"),
    "an empty tensor too large to index": ({"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])}, "a"),
    "a shape that needs more bytes": ({"a": entry(shape=[3])}, "needs 12 bytes.*span 8"),
    "a shape that needs fewer bytes": ({"a": entry(shape=[])}, "needs 4 bytes.*span 8"),
    "one offset": ({"a": entry(offsets=[8])}, "offsets"),
    "an offset that is true": ({"a": entry("U8", [1], [0, True])}, "offsets"),
    "an offset that is a fraction": ({"a": entry(offsets=[0, 8.0])}, "offsets"),
    "a negative offset": ({"a": entry(offsets=[-8, 0])}, r"offsets \[-8, 0\]"),
    "offsets in reverse": ({"a": entry(offsets=[8, 0])}, "truncated"),
    "an offset beyond the file": ({"a": entry(shape=[4], offsets=[0, 16])}, "truncated"),
    "an offset beyond 64 bits": ({"a": entry(offsets=[0, 2**64])}, "offsets"),
    "overlapping tensors": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "b begins at"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "b begins at"),
    "a hole before the first tensor": ({"a": entry(shape=[1], offsets=[4, 8])}, "a begins at"),
    "a hole between tensors": ({"a": entry("U8", [2], [0, 2]), "b": entry("U8", [2], [6, 8])}, "b begins at"),
    "bytes after the last tensor": ({"a": entry(shape=[1], offsets=[0, 4])}, "4 bytes follow"),
    "bytes without any tensor": ({}, "8 bytes follow"),
    "a list": ([entry()], "not a JSON object"),
    "no JSON": (b"\x80\x02}q\x00.", "not a JSON object"),
    "half of a JSON": (b'{"a":{"dtype"', "not a JSON object"),
    "deep nesting": (b"[" * 100_000, "not a JSON object"),
    "deep nesting in an entry": (b'{"a":' * 50_000, "not a JSON object"),
    "a number of ten thousand digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b']}}', "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("lie", HOSTILE)
def test_a_header_that_lies_is_refused_with_the_path_and_the_problem(tmp_path, lie):
    header, problem = HOSTILE[lie]
    path = raw_file(tmp_path / "hostile.safetensors", header, b"\x00" * 8)
    with pytest.raises(CheckpointError, match=rf"hostile\.safetensors.*{problem}"):
        SafetensorsReader(path)


@pytest.mark.parametrize("content", [b"", b"\x01\x00\x00", b"\x00" * 7])
def test_a_file_of_a_few_bytes_is_refused(tmp_path, content):
    path = tmp_path / "short"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"short.*{len(content)} bytes are too few"):
        SafetensorsReader(path)


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path, length):
    path = tmp_path / "long"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"long.*claims {length} bytes in a file of 10"):
        SafetensorsReader(path)


def test_a_header_longer_than_the_safetensors_package_allows_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "long"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 2**30)  # a hole: it takes no space on the disk
    with pytest.raises(CheckpointError, match=r"long.*claims 100000001 bytes"):
        SafetensorsReader(path)


def test_every_truncation_is_noticed(tmp_path):
    write(tmp_path / "whole", {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)})
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut"):
            SafetensorsReader(tmp_path / "cut")


def test_a_file_that_shrinks_after_opening_is_an_error_message(tmp_path):
    write(tmp_path / "file", {"a": torch.ones(1 << 20)})
    with SafetensorsReader(tmp_path / "file") as reader:
        os.truncate(tmp_path / "file", 1 << 20)
        with pytest.raises(CheckpointError, match=r"file.*a ends after"):
            reader.read("a")


def test_what_cannot_be_opened_is_refused_with_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*No such file"):
        SafetensorsReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="directory"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    "wrong", [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half()), ("a", torch.ones(2, 1))]
)
def test_another_tensor_than_the_announced_one_is_refused(tmp_path, wrong):
    writer = SafetensorsWriter(tmp_path / "file", [("a", torch.float32, (2,)), ("b", torch.float32, (2,))])
    with pytest.raises(ValueError, match=r"a torch.float32 \[2\] was announced"):
        writer.write(*wrong)
    writer.close()


def test_an_unfinished_file_and_one_tensor_too_many_are_refused(tmp_path):
    writer = SafetensorsWriter(tmp_path / "file", [("a", torch.float32, (2,))])
    with pytest.raises(ValueError, match=r"file.*1 announced"):
        writer.finish()
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="a"):
        writer.write("a", torch.ones(2))
    assert writer.finish().nbytes == (tmp_path / "file").stat().st_size


LAYOUT = [("a", torch.float32, (300, 7)), ("b", torch.bfloat16, (5,)), ("empty", torch.float32, (0,)), ("c", torch.int32, (9,))]  # fmt: skip


def begun(path, count):
    """A file whose first tensors were written when its writer was killed; what they are, and the sha256 of each."""
    tensors = {name: torch.arange(math.prod(shape)).reshape(shape).to(dtype) for name, dtype, shape in LAYOUT}
    writer = SafetensorsWriter(path, LAYOUT, {"format": "pt"})
    digests = {name: writer.write(name, tensors[name]) for name, _, _ in LAYOUT[:count]}
    writer.flush()
    writer.close()
    return tensors, digests


@pytest.mark.parametrize("count", range(5))
def test_a_begun_file_is_taken_up_where_it_ends(tmp_path, count):
    tensors, digests = begun(tmp_path / "whole", 4)
    begun(tmp_path / "file", count)
    with open(tmp_path / "file", "ab") as file:
        file.write(b"half of the next one, and more" * 10_000)
    writer = SafetensorsWriter(tmp_path / "file", LAYOUT, {"format": "pt"}, begun=True)
    for name in list(digests)[:count]:
        writer.go_on(writer.holds({name: digests[name]}))
    for name in list(digests)[count:]:
        assert writer.write(name, tensors[name]) == digests[name]
    record = writer.finish()
    assert (tmp_path / "file").read_bytes() == (tmp_path / "whole").read_bytes()
    assert record.sha256 == hashlib.sha256((tmp_path / "whole").read_bytes()).hexdigest()
    assert record.tensors == digests


def test_what_is_not_there_as_it_was_is_not_held(tmp_path):
    _, digests = begun(tmp_path / "file", 2)
    writer = SafetensorsWriter(tmp_path / "file", LAYOUT, {"format": "pt"}, begun=True)
    assert writer.holds({"a": digests["b"]}) is None  # another hash
    assert writer.holds({"b": digests["b"]}) is None  # not its turn
    assert writer.holds({**digests, "empty": digests["a"]}) is None  # one of several
    assert writer.holds({**digests, "empty": hashlib.sha256().hexdigest(), "c": digests["a"]}) is None  # ends before
    assert writer.holds(digests) is not None
    writer.close()
    other = SafetensorsWriter(tmp_path / "file", LAYOUT, {"format": "np"}, begun=True)  # another header: begins anew
    assert other.holds(digests) is None
    other.close()


def test_a_dtype_without_a_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"complex64.*BF16"):
        dtype_name(torch.complex64)
