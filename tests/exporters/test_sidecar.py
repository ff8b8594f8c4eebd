"""The sidecar: what goes in comes out, and what is not understood is refused."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibrationless import KINDS, Blocks, Kind, Patch, Points, covered, parts_of, restore
from exporters import sidecar
from exporters.errors import CheckpointError
from exporters.sidecar import OUTLIERS, PlannedPatch, SidecarReader, SidecarWriter, set_problem

SETS = {"outliers": {"kind": "points", "mode": "replace"}}
METADATA = {"format": "swquant-patches", "version": "1", "sets": json.dumps(SETS)}
SHAPE = (50, 60)
NAMES = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.7.w2", "lm_head", "weight.rows"]


def points(count: int, dtype: torch.dtype, seed: int = 0) -> Points:
    weight = torch.randn(50, 60, generator=torch.Generator().manual_seed(seed)).to(dtype)
    index = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))[:count]
    return Points.at(weight, index // 60, index % 60)


def save(path: Path, outliers: dict[str, Points]) -> int:
    writer = SidecarWriter(
        path, [PlannedPatch(OUTLIERS, name, len(each), SHAPE, each.values.dtype) for name, each in outliers.items()]
    )
    for name, each in outliers.items():
        writer.write(OUTLIERS, name, each)
    return writer.finish().nbytes


def parts(tensor: str = "x", count: int = 2, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a good sidecar of one weight, but for what is changed."""
    good = {
        "rows": torch.zeros(count, dtype=torch.int32),
        "cols": torch.arange(count, dtype=torch.int32),
        "values": torch.ones(count),
    }
    return {f"outliers/{tensor}.{part}": value for part, value in {**good, **changed}.items()}


@given(
    st.dictionaries(
        st.sampled_from(NAMES),
        st.tuples(st.integers(0, 40), st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )
)
@settings(max_examples=30)
def test_what_goes_in_comes_out(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("sidecar") / "outliers.safetensors"
    written = {name: points(count, dtype, seed) for seed, (name, (count, dtype)) in enumerate(sizes.items())}
    save(path, written)
    reader = SidecarReader(path)
    assert sorted(reader.tensors) == sorted(written)
    for name, outliers in written.items():
        read = reader.read(OUTLIERS, name, SHAPE)
        assert isinstance(read, Points)
        assert reader.counts[OUTLIERS][name] == len(outliers)
        assert torch.equal(read.rows, outliers.rows)
        assert torch.equal(read.cols, outliers.cols)
        assert torch.equal(read.values, outliers.values)
        assert read.values.dtype is outliers.values.dtype
    assert all("another" not in counts for counts in reader.counts.values())
    reader.close()


def test_the_file_has_the_names_and_the_metadata_of_the_documentation(tmp_path):
    save(tmp_path / "file", {"x": points(3, torch.bfloat16)})
    stored = safetensors.torch.load_file(tmp_path / "file")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "outliers/x.rows": (torch.int32, (3,)),
        "outliers/x.cols": (torch.int32, (3,)),
        "outliers/x.values": (torch.bfloat16, (3,)),
    }
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert {**file.metadata(), "sets": json.loads(file.metadata()["sets"])} == {**METADATA, "sets": SETS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_point_takes_the_bytes_that_the_plan_counts(tmp_path, dtype):
    nbytes = save(tmp_path / "file", {"x": points(164, dtype)})
    header = int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert nbytes == 8 + header + PlannedPatch(OUTLIERS, "x", 164, SHAPE, dtype).nbytes


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_values_that_no_weight_has_are_refused(tmp_path, dtype):
    safetensors.torch.save_file(parts(values=torch.ones(2).to(dtype)), tmp_path / "file", METADATA)
    with pytest.raises(CheckpointError, match=r"file.*x"):
        SidecarReader(tmp_path / "file").read(OUTLIERS, "x", SHAPE)


OTHER_SETS = {
    "none": "",
    "not JSON": "{",
    "another kind of set": json.dumps({**SETS, "tuned": {"kind": "channels", "mode": "add"}}),
    "another mode of blocks": json.dumps({**SETS, "tuned": {"kind": "blocks", "mode": "multiply"}}),
    "a name with a slash": json.dumps({**SETS, "tuned/x": {"kind": "blocks", "mode": "add"}}),
    "an empty name": json.dumps({**SETS, "": {"kind": "blocks", "mode": "add"}}),
    "another mode": json.dumps({"outliers": {"kind": "points", "mode": "add"}}),
    "another kind": json.dumps({"outliers": {"kind": "blocks", "mode": "replace"}}),
    "a known kind under another name": json.dumps({**SETS, "tuned": {"kind": "points", "mode": "replace"}}),
    "more than a kind and a mode": json.dumps({"outliers": {"kind": "points", "mode": "replace", "scale": 2}}),
    "a set that is a number": json.dumps({"outliers": 5}),
    "a list": "[]",
    "deep nesting": "[" * 100_000,
}


@pytest.mark.parametrize("sets", OTHER_SETS)
def test_sets_that_are_not_known_are_refused(tmp_path, sets):
    safetensors.torch.save_file(parts(), tmp_path / "file", {**METADATA, "sets": OTHER_SETS[sets]})
    with pytest.raises(CheckpointError, match=r"file.*patch set.*update swquant$"):
        SidecarReader(tmp_path / "file")


def test_a_set_that_is_not_known_is_named(tmp_path):
    sets = {**SETS, "whole": {"kind": "channels", "mode": "replace"}}
    tensors = {**parts(), "whole/x.cols": torch.zeros(2, dtype=torch.int32), "whole/x.values": torch.ones(50, 2)}
    safetensors.torch.save_file(tensors, tmp_path / "file", {**METADATA, "sets": json.dumps(sets)})
    with pytest.raises(CheckpointError, match="file: its patch set 'whole' is not known to this version"):
        SidecarReader(tmp_path / "file")


@pytest.mark.parametrize("changed", [{"version": "2"}, {"version": ""}, {"format": "swquant-deltas"}])
def test_another_version_or_format_is_refused(tmp_path, changed):
    safetensors.torch.save_file(parts(), tmp_path / "file", {**METADATA, **changed})
    with pytest.raises(CheckpointError, match=r"file.*is not swquant-patches 1; update"):
        SidecarReader(tmp_path / "file")


def test_metadata_that_is_missing_or_not_text_is_refused(tmp_path):
    safetensors.torch.save_file(parts(), tmp_path / "file")
    with pytest.raises(CheckpointError, match="is not swquant-patches"):
        SidecarReader(tmp_path / "file")
    header = json.dumps({"__metadata__": {**METADATA, "sets": 5}}).encode()
    (tmp_path / "number").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="number"):
        SidecarReader(tmp_path / "number")


@pytest.mark.parametrize("missing", ["rows", "cols", "values"])
def test_a_missing_part_is_refused_with_those_that_are_there(tmp_path, missing):
    tensors = parts()
    del tensors[f"outliers/x.{missing}"]
    safetensors.torch.save_file(tensors, tmp_path / "file", METADATA)
    with pytest.raises(CheckpointError, match=r"file.*outliers/x has the parts"):
        SidecarReader(tmp_path / "file")


@pytest.mark.parametrize("name", ["outliers/x.extra", "tuned/x.rows", "x.rows", "rows"])
def test_a_tensor_that_is_no_part_of_a_set_is_refused(tmp_path, name):
    safetensors.torch.save_file({**parts(), name: torch.zeros(2, dtype=torch.int32)}, tmp_path / "file", METADATA)
    with pytest.raises(CheckpointError, match=r"file.*has the parts"):
        SidecarReader(tmp_path / "file")


def test_points_of_a_set_that_the_metadata_does_not_name_are_refused(tmp_path):
    tensors = {name.replace("outliers", "tuned"): value for name, value in parts().items()}
    safetensors.torch.save_file(tensors, tmp_path / "file", METADATA)
    with pytest.raises(CheckpointError, match=r"file.*tuned/x"):
        SidecarReader(tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_the_tensor(tmp_path, value):
    safetensors.torch.save_file(parts(values=torch.tensor([1.0, value])), tmp_path / "file", METADATA)
    with pytest.raises(CheckpointError, match=r"file.*outlier of x is NaN or infinite"):
        SidecarReader(tmp_path / "file").read(OUTLIERS, "x", SHAPE)


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": torch.zeros(2, dtype=torch.int64)},
        {"cols": torch.zeros(2)},
        {"rows": torch.zeros(3, dtype=torch.int32)},
        {"values": torch.ones(1)},
        {"values": torch.ones(2, 1)},
        {
            "rows": torch.tensor(0, dtype=torch.int32),
            "cols": torch.tensor(0, dtype=torch.int32),
            "values": torch.tensor(1.0),
        },
        {
            "rows": torch.zeros(2, 2, dtype=torch.int32),
            "cols": torch.zeros(2, 2, dtype=torch.int32),
            "values": torch.ones(2, 2),
        },
    ],
    ids=lambda changed: " ".join(f"{part} {value.dtype} {list(value.shape)}" for part, value in changed.items()),
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, changed):
    safetensors.torch.save_file(parts(**changed), tmp_path / "file", METADATA)
    with pytest.raises(CheckpointError, match=r"file.*x"):
        count_and_read(tmp_path / "file")


def count_and_read(path: Path) -> tuple[int, Patch]:
    reader = SidecarReader(path)
    return reader.counts[OUTLIERS]["x"], reader.read(OUTLIERS, "x", SHAPE)


def test_points_of_another_number_than_announced_are_refused(tmp_path):
    writer = SidecarWriter(tmp_path / "file", [PlannedPatch(OUTLIERS, "x", 3, SHAPE, torch.float32)])
    with pytest.raises(ValueError, match=r"outliers/x.rows.*\[3\] was announced"):
        writer.write(OUTLIERS, "x", points(2, torch.float32))
    with pytest.raises(ValueError, match="not written"):
        writer.finish()
    writer.close()


@dataclass(frozen=True)
class Channels:
    """Another kind, of which nothing but its row of the table is known: whole input channels."""

    cols: torch.Tensor
    values: torch.Tensor  # [out, n]
    mode: str = "replace"

    def __len__(self) -> int:
        return self.cols.numel()


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a second set, laid over a weight after the outliers."""
    make: Any = Channels
    kind = Kind(
        make,
        "a channel",
        ("replace",),
        lambda count, shape, side: {"cols": (count,), "values": (shape[0], count)},
        lambda patch, shape: (
            torch.arange(shape[0]).unsqueeze(1),
            patch.cols.to(torch.int64).unsqueeze(0),
            patch.values,
        ),
    )
    monkeypatch.setitem(KINDS, "channels", kind)
    monkeypatch.setitem(sidecar.SETS, "whole", ("channels", "replace"))
    return "whole"


def blocks(data: Any, shape: tuple[int, int], side: int, dtype: torch.dtype, mode: str) -> Blocks:
    """Some blocks of a weight, those at the edge with zeros where they stick out."""
    grid = [*itertools.product(range(-(-shape[0] // side)), range(-(-shape[1] // side)))]
    chosen = sorted(data.draw(st.sets(st.sampled_from(grid), min_size=1)))
    rows, cols = (torch.tensor(index, dtype=torch.int32) for index in zip(*chosen, strict=True))
    values = torch.randn(len(rows), side, side, generator=torch.Generator().manual_seed(3)).to(dtype)
    inner = torch.arange(side)
    inside = (rows.view(-1, 1, 1) * side + inner.view(-1, 1) < shape[0]) & (
        cols.view(-1, 1, 1) * side + inner < shape[1]
    )
    return Blocks(rows, cols, values * inside, mode)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_kind_is_written_read_and_restored(tmp_path_factory, channels, shape, data, dtype):
    """All sets together on one weight, the later over the earlier, against a restoring of plain loops."""
    path = tmp_path_factory.mktemp("sidecar") / "outliers.safetensors"
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    cells = data.draw(st.sets(st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1)), min_size=1))
    cols = sorted(data.draw(st.sets(st.integers(0, shape[1] - 1), min_size=1)))
    side, mode = data.draw(st.integers(1, 12)), data.draw(st.sampled_from(["add", "replace"]))
    patched = blocks(data, shape, side, dtype, mode)
    patches: dict[str, Any] = {
        OUTLIERS: Points.at(weight, *torch.tensor(sorted(cells)).T),
        channels: Channels(torch.tensor(cols, dtype=torch.int32), 2 * weight[:, cols]),
        "tuned": patched,
    }
    assert {type(patch) for patch in patches.values()} == {kind.patch for kind in KINDS.values()}
    written = dict(reversed(patches.items()))  # the order of the file is not that of the sets
    planned = [PlannedPatch(of_set, "x", len(patch), shape, dtype, side, mode) for of_set, patch in written.items()]
    writer = SidecarWriter(path, planned)
    for of_set, patch in written.items():
        writer.write(of_set, "x", patch)
    nbytes = writer.finish().nbytes
    assert nbytes == 8 + int.from_bytes(path.read_bytes()[:8], "little") + sum(patch.nbytes for patch in planned)
    reader = SidecarReader(path)
    assert reader.counts == {of_set: {"x": len(patch)} for of_set, patch in patches.items()}
    assert reader.forms["tuned"] == ("blocks", mode)
    assert sorted(reader.counts) == sorted([OUTLIERS, channels, "tuned"])
    assert list(reader.counts)[-1] == "tuned"
    patches = {of_set: patches[of_set] for of_set in reader.counts}
    read = reader.read_all("x", shape)
    for before, after in zip(patches.values(), read, strict=True):
        assert after.mode == before.mode
        for part, value in parts_of(before).items():
            assert torch.equal(getattr(after, part), value)
    expected, held = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool)
    for of_set in patches:
        for row, col in cells if of_set == OUTLIERS else ():
            expected[row, col], held[row, col] = weight[row, col], True
        for col in cols if of_set == channels else ():
            expected[:, col], held[:, col] = 2 * weight[:, col], True
    for row_block, col_block, values in zip(patched.rows, patched.cols, patched.values, strict=True):
        for i, j in itertools.product(range(side), repeat=2):
            row, col = int(row_block) * side + i, int(col_block) * side + j
            if row < shape[0] and col < shape[1]:
                before = float(expected[row, col]) if mode == "add" else 0.0
                expected[row, col] = torch.tensor(before, dtype=torch.float32) + values[i, j].float()
                held[row, col] |= mode == "replace"
    assert torch.equal(restore(torch.zeros(shape, dtype=dtype), *read), expected)
    mask = covered(read, shape)
    assert mask is not None
    assert torch.equal(mask, held)
    reader.close()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"cols": torch.tensor([1, 60], dtype=torch.int32)}, "column is outside 0 .. 59"),
        ({"cols": torch.tensor([-1, 5], dtype=torch.int32)}, "column is outside 0 .. 59"),
        ({"cols": torch.tensor([5, 5], dtype=torch.int32)}, "same place occurs twice"),
        ({"values": torch.ones(49, 2)}, "do not belong"),
        ({"values": torch.ones(50, 3)}, "do not belong"),
        ({"values": torch.full((50, 2), float("nan"))}, "NaN or infinite"),
    ],
    ids=str,
)
def test_every_kind_is_checked(tmp_path, channels, changed, problem):
    good = {"cols": torch.tensor([1, 5], dtype=torch.int32), "values": torch.ones(50, 2)}
    tensors = {f"{channels}/x.{part}": value for part, value in {**good, **changed}.items()}
    sets = {channels: {"kind": "channels", "mode": "replace"}}
    safetensors.torch.save_file(tensors, tmp_path / "file", {**METADATA, "sets": json.dumps(sets)})
    with pytest.raises(CheckpointError, match=rf"file.*a channel of x.*{problem}"):
        SidecarReader(tmp_path / "file").read(channels, "x", SHAPE)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"rows": torch.tensor([0, 4], dtype=torch.int32)}, "row is outside 0 .. 3"),
        ({"cols": torch.tensor([-1, 0], dtype=torch.int32)}, "column is outside 0 .. 3"),
        ({"cols": torch.tensor([1, 1], dtype=torch.int32), "rows": torch.tensor([2, 2], dtype=torch.int32)}, "twice"),
        ({"values": torch.ones(2, 16, 15)}, "do not belong"),
        ({"values": torch.ones(2, 16)}, "do not belong"),
        ({"values": torch.ones(2, 0, 0)}, "do not belong"),
        ({"values": torch.tensor(1.0)}, "do not belong"),
        ({"values": torch.full((2, 16, 16), float("inf"))}, "NaN or infinite"),
    ],
    ids=range(8),
)
def test_blocks_are_checked(tmp_path, changed, problem):
    index = torch.tensor([0, 3], dtype=torch.int32)
    good = {"rows": index, "cols": index.clone(), "values": torch.ones(2, 16, 16)}
    tensors = {f"tuned/x.{part}": value for part, value in {**good, **changed}.items()}
    sets = {"tuned": {"kind": "blocks", "mode": "add"}}
    safetensors.torch.save_file(tensors, tmp_path / "file", {**METADATA, "sets": json.dumps(sets)})
    with pytest.raises(CheckpointError, match=rf"file.*a block of x.*{problem}"):
        SidecarReader(tmp_path / "file").read("tuned", "x", SHAPE)


@pytest.mark.parametrize("name", ["outliers", "", "a/b", "Tuned", "a" * 41, "-a"])
def test_sets_of_blocks_have_plain_names(name):
    assert set_problem(name)
    assert set_problem("task-2") is None


def test_blocks_on_a_finer_weight_are_added_in_float32():
    """1 + 2^-9 is no bfloat16, but what rounds to one with it added is found."""
    weight = torch.full((2, 2), 1.0, dtype=torch.bfloat16)
    index = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        restore(weight, Blocks(index, index, torch.full((1, 2, 2), 0.005, dtype=torch.bfloat16)))
    assert torch.equal(weight, torch.full((2, 2), 1.015625, dtype=torch.bfloat16))


def test_a_point_that_occurs_twice_is_refused(tmp_path):
    twice = parts(rows=torch.tensor([3, 3], dtype=torch.int32), cols=torch.tensor([4, 4], dtype=torch.int32))
    safetensors.torch.save_file(twice, tmp_path / "file", METADATA)
    with pytest.raises(CheckpointError, match=r"file.*outlier of x.*twice"):
        SidecarReader(tmp_path / "file").read(OUTLIERS, "x", SHAPE)


def test_every_set_has_a_kind():
    assert {kind for kind, _ in sidecar.SETS.values()} | {"blocks"} == set(KINDS)
    assert all(mode in KINDS[kind].modes for kind, mode in sidecar.SETS.values())
