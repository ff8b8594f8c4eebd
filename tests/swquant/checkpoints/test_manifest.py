"""The manifest has exactly the keys that its types say and docs/format.md explains, and anything else is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import Cli, one_line
from support.paths import PROJECT

import swquant
from calibrationless import LayerSpike, SuperActivation, SuperWeight
from exporters.json_file import read_json
from swquant.checkpoints import detection_schema, onnx_schema, pool_schema, schema
from swquant.checkpoints.manifest import MANIFEST, is_checkpoint, is_onnx, made_with, read_manifest, write_manifest
from swquant.compress.options import CompressOptions
from swquant.export.onnx.options import ExportOptions

# Table of docs/format.md -> the types whose keys are its rows.
TABLES: dict[str, tuple[Any, ...]] = {
    "a checkpoint": (schema.CheckpointManifest,),
    "an ONNX folder": (schema.OnnxManifest,),
    "a folder for MLX": (schema.MlxManifest,),
    "patches alone": (schema.PatchesManifest,),
    "`tensors.NAME` of patches alone": (schema.PatchedRecord,),
    "`source`": (schema.SourceRecord,),
    "`options` of a checkpoint, as in [commands](commands.md)": (schema.OptionsRecord,),
    "`options` of an ONNX folder": (onnx_schema.ExportRecord,),
    "`detection`": (detection_schema.DetectionRecord,),
    "`detection.super_weights`, `detection.cancellers`": (detection_schema.SuperWeightRecord,),
    "`detection.super_activations`": (detection_schema.SuperActivationRecord,),
    "`detection.layers`": (detection_schema.LayerRecord,),
    "`detection.published`": (detection_schema.PublishedRecord,),
    "`activations`": (schema.ActivationsRecord,),
    "`tensors.NAME`": (schema.DenseRecord, schema.RoundedRecord),
    "`tensors.NAME.inputs`": (schema.InputsRecord,),
    "`tensors.NAME.super_weights`": (schema.PointRecord,),
    "`tuned.NAME`": (schema.TuningRecord,),
    "`tuned.NAME.options`, as in [commands](commands.md)": (schema.TuneOptionsRecord,),
    "`merged`": (schema.MergeRecord,),
    "`pool`": (pool_schema.PoolRecord,),
    "`pool.sets.NAME`": (pool_schema.PoolSetRecord,),
    "`pool.sets.NAME.tasks.NAME`": (pool_schema.TaskRecord,),
    "`pool.sets.NAME.tasks.NAME.decision`": (pool_schema.DecisionRecord,),
    "`pool.sets.NAME.tasks.NAME.decision.sets.NAME`": (pool_schema.HindranceRecord,),
    "`pool.sets.NAME.tasks.NAME.options`, as in [commands](commands.md)": (pool_schema.AdaptOptionsRecord,),
    "`files.NAME`": (schema.FileEntry,),
    "`totals` of a checkpoint": (schema.CheckpointTotals,),
    "`totals` of an exported folder": (schema.ExportTotals,),
    "`compression`": (schema.CompressionRecord,),
    "`check`": (onnx_schema.CheckRecord,),
    "`weights.NAME`": (onnx_schema.NodeRecord,),
}
OPTIONAL = {key for kinds in TABLES.values() for kind in kinds for key in kind.__optional_keys__}
Key = tuple[str | int, ...]
# A value of every type of JSON.
VALUES = (None, True, 7, 0.5, "text", [], ["a"], {})


@cache
def keys_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def records(hint: Any) -> Iterator[Any]:
    """The TypedDicts that a type leads to, itself included."""
    if isinstance(hint, type) and hasattr(hint, "__required_keys__"):
        yield hint
        for inner in keys_of(hint).values():
            yield from records(inner)
    for inner in get_args(hint):
        yield from records(inner)


def words(hint: Any) -> str:
    """A type as the document says it."""
    inner = get_args(hint)
    if get_origin(hint) is NotRequired:
        return f"{words(inner[0])}, optional"
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if get_origin(hint) is list:
        return f"list of {words(inner[0])}"
    if get_origin(hint) is dict:
        return f"object of {words(inner[1])}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(words, inner)))
    return {str: "text", int: "integer", float: "number", bool: "boolean", NoneType: "null"}.get(hint, "object")


def documented() -> dict[str, dict[str, str]]:
    """Table of the section on the manifest -> key -> type, as docs/format.md says."""
    section = (PROJECT / "docs/format.md").read_text().split("\n## Manifest\n")[1].split("\n## ")[0]
    tables = re.findall(r"^\| (.+?) \| \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    return {title: dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", rows, re.MULTILINE)) for title, rows in tables}


def test_the_document_names_every_key_and_its_type() -> None:
    tables = documented()
    assert set(tables) == set(TABLES)
    for title, kinds in TABLES.items():
        assert tables[title] == {key: words(hint) for kind in kinds for key, hint in keys_of(kind).items()}, title


def test_every_record_has_a_table() -> None:
    assert set(records(schema.Manifest)) == {kind for kinds in TABLES.values() for kind in kinds}


@pytest.mark.parametrize(
    ("record", "of"),
    [
        (schema.OptionsRecord, CompressOptions),
        (onnx_schema.ExportRecord, ExportOptions),
        (detection_schema.SuperWeightRecord, SuperWeight),
        (detection_schema.SuperActivationRecord, SuperActivation),
        (detection_schema.LayerRecord, LayerSpike),
    ],
    ids=lambda kind: kind.__name__,
)
def test_a_record_of_a_dataclass_has_its_fields_in_their_order(record: Any, of: Any) -> None:
    assert list(keys_of(record)) == [field.name for field in fields(of)]


def manifest_of(folder: Path) -> dict[str, Any]:
    """A manifest, of whose tensors, files and layers only those are left that have other keys than those before."""
    manifest = read_json(folder / MANIFEST)
    for table in ("tensors", "files", "weights"):
        if table in manifest:
            manifest[table] = dict({tuple(record): (name, record) for name, record in manifest[table].items()}.values())
    manifest["detection"]["layers"] = manifest["detection"]["layers"][:1]
    return manifest


@pytest.fixture(params=["int8", "onnx", "mlx"])
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    manifest = manifest_of(request.getfixturevalue(request.param))
    if request.param == "mlx":  # the other two have the same records in these lists
        manifest["detection"] |= {key: [] for key, value in manifest["detection"].items() if isinstance(value, list)}
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / MANIFEST).parent.mkdir()
    return tmp_path


def write_signed(folder: Path, manifest: dict[str, Any]) -> None:
    """With a digest that is right, so that only a look at the keys can find what is wrong."""
    content: Any = {key: value for key, value in manifest.items() if key not in ("format", "version", "digest")}
    write_manifest(folder, content)


def places(value: Any, here: Key = ()) -> Iterator[Key]:
    """Where something lies in a manifest, outermost first; of the items of a list only the first."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*here, key)
            yield from places(inner, (*here, key))
    elif isinstance(value, list) and value:
        yield (*here, 0)
        yield from places(value[0], (*here, 0))


def parent_of(manifest: Any, place: Key) -> Any:
    for key in place[:-1]:
        manifest = manifest[key]
    return manifest


def refusal(folder: Path) -> str:
    """What `read_manifest` says against a manifest, which is one line that a terminal can show."""
    with pytest.raises(swquant.SwquantError) as caught:
        read_manifest(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{folder / MANIFEST}: ")
    assert "fetch" in message
    assert len(message) < len(str(folder)) + 400
    return message.removeprefix(f"{folder / MANIFEST}: ")


def test_what_is_written_is_read_as_it_was(int8: Path, onnx: Path, mlx: Path) -> None:
    for folder in (int8, onnx, mlx):
        manifest = read_manifest(folder)
        assert manifest == read_json(folder / MANIFEST)
        assert list(manifest) == list(read_json(folder / MANIFEST))
        assert (is_checkpoint(manifest), is_onnx(manifest)) == (folder == int8, folder == onnx)
        assert made_with(manifest) == read_json(folder / MANIFEST).get("compression", manifest)["options"]


def test_the_checkpoint_of_these_tests_has_every_key(int8: Path) -> None:
    tensors = read_json(int8 / MANIFEST)["tensors"].values()
    assert {key for record in tensors for key in record} == {
        *keys_of(schema.DenseRecord),
        *keys_of(schema.RoundedRecord),
    } - {"blocks"}  # only `tune` makes them
    assert {key for record in tensors for key in record.get("inputs", ())} == set(keys_of(schema.InputsRecord))


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value is of a type, said once more: independent of the library that checks it."""
    inner = get_args(hint)
    match get_origin(hint):
        case origin if origin is NotRequired:
            return accepts(inner[0], value)
        case origin if origin is Literal:
            return value in inner and type(value) in map(type, inner)
        case origin if origin is list:
            return isinstance(value, list) and all(accepts(inner[0], item) for item in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(accepts(inner[1], item) for item in value.values())
        case origin if origin in (Union, UnionType):
            return any(accepts(kind, value) for kind in inner)
    if hasattr(hint, "__required_keys__"):
        return (
            isinstance(value, dict)
            and hint.__required_keys__ <= set(value) <= set(keys_of(hint))
            and all(accepts(keys_of(hint)[key], item) for key, item in value.items())
        )
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint or (hint is NoneType and value is None)


def check_against_types(folder: Path, manifest: dict[str, Any]) -> str:
    """`read_manifest` takes exactly what the types allow. Returns what it says against the rest."""
    write_signed(folder, manifest)
    kinds = (schema.CheckpointManifest, schema.OnnxManifest, schema.MlxManifest)
    if not any(accepts(kind, read_json(folder / MANIFEST)) for kind in kinds):
        return refusal(folder)
    read_manifest(folder)
    return ""


def test_without_any_of_its_keys_it_is_refused(manifest: dict[str, Any], folder: Path) -> None:
    for place in places(manifest):
        if place[0] not in ("format", "version", "digest", "kind"):
            changed = copy.deepcopy(manifest)
            del parent_of(changed, place)[place[-1]]
            message = check_against_types(folder, changed)
            where = ".".join(map(str, place))
            assert not message or "is missing" in message
            assert not message or place[-1] == "dense" or where[:90] in message
            # An item of a list, a tensor, a file, …: nothing says how many there have to be.
            counted = {"tensors", "files", "loaders", "left_out", "providers", "operators", "weights", "sha256"}
            assert message or isinstance(place[-1], int) or place[-1] in OPTIONAL or place[-2] in counted


def test_with_another_type_anywhere_it_is_refused(manifest: dict[str, Any], folder: Path) -> None:
    for place in places(manifest):
        if place[0] not in ("format", "version", "digest"):
            for value in VALUES:
                changed = copy.deepcopy(manifest)
                parent_of(changed, place)[place[-1]] = value
                check_against_types(folder, changed)


def test_a_key_that_nobody_knows_is_refused_wherever_it_is(manifest: dict[str, Any], folder: Path) -> None:
    for place in [(), *places(manifest)]:
        changed = copy.deepcopy(manifest)
        record = parent_of(changed, (*place, ""))
        if isinstance(record, dict):
            record["a\x1b[2J\nb"] = {"of": ["another", "version"]}
            write_signed(folder, changed)
            assert refusal(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("tensors", "model.layers.1.mlp.down_proj.weight", "outliers"), "many", 'a valid integer, not "many"'),
        (("options", "bits"), 4.0, "options.bits should be a valid integer, not 4.0"),
        (("options", "restore"), 1, "options.restore should be a valid boolean, not 1"),
        (("swquant",), "\x1b]0;title\x07\u202e" + "x" * 500, None),
        (("swquant",), ["\x1b]0;title\x07\u202e" + "x" * 500], "swquant should be a valid string, not"),
        (("kind",), "gguf", "kind gguf is none that this version knows; update swquant"),
        (("kind",), ["onnx"], "is none that this version knows; update swquant"),
        (("kind",), "mlx", "is missing; write the folder again"),
        (("activations",), {}, "activations.dtype is missing"),
        (("options", "colour"), "red", "options.colour is not a key that this version knows; update swquant, or fetch"),
        (("totals", "a\x1b[2J\nb"), 1, r"totals.a\x1b[2J\nb is not a key"),
        (("detection", "super_weights", 0, "row"), None, "detection.super_weights.0.row should be a valid integer"),
    ],
)
def test_the_message_names_the_key_and_what_it_should_be(
    int8: Path, folder: Path, place: Key, value: Any, message: str | None
) -> None:
    changed = read_json(int8 / MANIFEST)
    parent_of(changed, place)[place[-1]] = value
    write_signed(folder, changed)
    if message is None:
        read_manifest(folder)
    else:
        assert message in refusal(folder)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(int8: Path, folder: Path, value: str) -> None:
    text = (int8 / MANIFEST).read_text()
    (folder / MANIFEST).write_text(re.sub(r'"relative_error": [\d.e-]+', f'"relative_error": {value}', text, count=1))
    assert "not JSON" in refusal(folder)


@pytest.mark.parametrize(("form", "version"), [("x\n\x1b[2J" * 200, 1), ("swquant-manifest", {"a": "\n" * 500})])
def test_what_it_claims_to_be_is_not_printed_raw(folder: Path, form: str, version: object) -> None:
    (folder / MANIFEST).write_text(json.dumps({"format": form, "version": version}))
    with pytest.raises(swquant.SwquantError, match="update swquant") as caught:
        read_manifest(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(folder)) + 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_whatever_stands_there_it_is_read_or_refused(
    int8: Path, onnx: Path, mlx: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / MANIFEST).parent.mkdir()
    changed = manifest_of(data.draw(st.sampled_from([int8, onnx, mlx])))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([place for place in places(changed) if place[0] != "version"]))
        parent_of(changed, place)[place[-1]] = data.draw(JSON)
    check_against_types(folder, changed)


LIES: dict[type, tuple[Any, ...]] = {int: (-1, 10**15), str: ("",), list: ([],), float: (0.0,)}


@pytest.mark.parametrize("command", ["inspect", "verify", pytest.param("generate", marks=pytest.mark.slow)])
def test_a_manifest_of_the_right_types_that_lies_is_one_line_or_shown(
    int8: Path, tmp_path: Path, cli: Cli, command: str
) -> None:
    folder = Path(shutil.copytree(int8, tmp_path / "lies"))
    manifest = read_json(folder / MANIFEST)
    shown = manifest_of(folder)
    if command != "inspect":  # which alone looks at all of it
        shown = {key: shown[key] for key in ("tensors", "files", "activations")}
    for place in places(shown):
        for value in LIES.get(type(parent_of(shown, place)[place[-1]]), ()):
            changed = copy.deepcopy(manifest)
            parent_of(changed, place)[place[-1]] = value
            write_signed(folder, changed)
            ran = cli(command, folder, *(["t5 t9", "--tokens", "1"] if command == "generate" else []))
            assert ran.code == 0 or ran.err.startswith("damaged: ") or one_line(ran).startswith("error: "), place
