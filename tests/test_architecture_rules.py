"""The architecture, read from the sources: who may import whom, how long a module is, what is documented."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# calibrationless <- exporters <- swquant
MAY_IMPORT_OF_OURS = {
    "calibrationless": {"calibrationless"},
    "exporters": {"calibrationless", "exporters"},
    "swquant": {"calibrationless", "exporters", "swquant"},
}
MODULES = sorted(path for package in MAY_IMPORT_OF_OURS for path in (ROOT / package).rglob("*.py"))
# The floors of swquant/, the lowest first: a room (a folder, or a file at its root) imports from lower floors only.
LAYERS = (
    {"interrupts", "parallel", "pr_moe", "progress", "scratch", "units", "version"},
    {"checkpoints", "declared", "drawing"},
    {"cluster", "models", "output"},
    {"detect", "doctor", "evaluate", "ort"},
    {"compress", "training"},
    {"distill", "export", "merge", "moe", "push", "study", "tune"},
    {"adapt"},
    {"api", "derive", "terminal"},
    {"cli", "hf"},
    {"__init__", "__main__"},
)
MAX_LINES = 400
MAX_FUNCTION = 60


def module_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def room(path: Path) -> str:
    """The folder or file of swquant/ that a module belongs to."""
    return path.relative_to(ROOT / "swquant").parts[0].removesuffix(".py")


def imports(path: Path) -> set[Path]:
    """The modules of ours that a module imports, wherever in it, also for type checking only."""
    found: set[Path] = set()
    for node in walk(path, ast.ImportFrom | ast.Import):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file in MODULES}
    return found


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a module imports, wherever in it, also for type checking only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module_id(path)}:{node.lineno} imports relatively; name the package"
            names.add(str(node.module))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if function in ("import_module", "__import__") and package(path) != "swquant":
                raise AssertionError(f"{module_id(path)}:{node.lineno} imports by name, which nobody can check")
    return {name.partition(".")[0] for name in names}


def of_package(name: str) -> list[Path]:
    modules = [path for path in MODULES if package(path) == name]
    assert len(modules) >= 5, f"only {len(modules)} modules of {name}: is the folder where it was?"
    return modules


def test_there_are_three_packages() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {package(path) for path in MODULES} == set(MAY_IMPORT_OF_OURS) == folders


@pytest.mark.parametrize("name", MAY_IMPORT_OF_OURS)
def test_imports_go_to_the_left_only(name: str) -> None:
    for path in of_package(name):
        ours = imported(path) & set(MAY_IMPORT_OF_OURS)
        assert ours <= MAY_IMPORT_OF_OURS[name], module_id(path)


def test_every_room_of_swquant_has_a_floor() -> None:
    named = [name for layer in LAYERS for name in layer]
    assert len(named) == len(set(named))
    assert set(named) == {room(path) for path in of_package("swquant")}


def test_imports_inside_swquant_go_down_only() -> None:
    floor = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    upwards = [
        f"{module_id(path)} imports {module_id(other)}"
        for path in of_package("swquant")
        for other in imports(path)
        if package(other) == "swquant"
        and room(other) not in (room(path), "__init__")
        and floor[room(other)] >= floor[room(path)]
    ]
    assert upwards == []


def test_every_load_from_a_folder_says_whether_its_code_is_trusted() -> None:
    """transformers' Auto classes ask on the terminal where nothing is said, and may be answered."""
    for path in MODULES:
        for call in walk(path, ast.Call):
            function = call.func
            if not isinstance(function, ast.Attribute) or function.attr not in ("from_pretrained", "from_config"):
                continue
            if isinstance(function.value, ast.Name) and function.value.id.lower().startswith("auto"):
                said = any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
                assert said, f"{module_id(path)}:{call.lineno} leaves trust_remote_code out"


def test_only_the_face_itself_and_main_import_the_face() -> None:
    face = ROOT / "swquant/__init__.py"
    assert [module_id(path) for path in MODULES if face in imports(path) and path != face] == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {path: imports(path) for path in MODULES}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(map(module_id, (*trail[trail.index(path) :], path)))
        if path not in done:
            for other in sorted(graph[path]):
                visit(other, (*trail, path))
            done.add(path)

    for path in MODULES:
        visit(path, ())


KERNELS = (
    "kernels.py",
    "line_kernels.py",
    "passes.py",
    "super_kernels.py",
    "tiles.py",
)  # the places with loops of our own


def test_calibrationless_needs_nothing_but_torch() -> None:
    for path in of_package("calibrationless"):
        compiler = {"numba", "numpy"} if path.name in KERNELS else set()
        others = imported(path) - set(sys.stdlib_module_names) - {"calibrationless", "torch"} - compiler
        assert not others, module_id(path)


def test_calibrationless_reads_and_writes_nothing() -> None:
    for path in of_package("calibrationless"):
        assert not imported(path) & {"io", "json", "os", "pathlib", "shutil", "subprocess", "tempfile"}, module_id(path)
        calls = {node.func.id for node in walk(path, ast.Call) if isinstance(node.func, ast.Name)}
        assert not calls & {"open", "print", "input"}, module_id(path)


def test_exporters_know_no_models_and_no_terminal() -> None:
    forbidden = {"accelerate", "huggingface_hub", "rich", "tokenizers", "transformers", "typer"}
    for path in of_package("exporters"):
        assert not imported(path) & forbidden, module_id(path)


def test_help_does_not_wait_for_torch() -> None:
    """Whatever the command line imports at the top is waited for by `swquant --help`."""
    seen: set[Path] = set()
    waiting = [path for path in sorted((ROOT / "swquant/cli").glob("*.py")) if path.name != "optimum_command.py"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        top = ast.parse(path.read_text()).body
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        modules = {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
        heavy = {name.partition(".")[0] for name in names | modules}
        assert not heavy & {"torch", "transformers", "calibrationless", "matplotlib", "pydantic"}, module_id(path)
        places = (ROOT.joinpath(*module.split(".")).with_suffix(".py") for module in modules)
        waiting += [place for place in places if place in MODULES]


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_a_module_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text))


def test_functions_are_short() -> None:
    """Longest where torch's exporter dictates: see docs/architecture.md."""
    functions = [
        (node.end_lineno - node.lineno + 1, f"{module_id(path)}:{node.name}")
        for path in MODULES
        for node in walk(path, ast.FunctionDef)
    ]
    assert [name for length, name in functions if length >= MAX_FUNCTION] == []


def walk(path: Path, kind: type) -> Iterator:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__main__.py"], ids=module_id)
def test_what_is_public_exists_and_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = public_names(tree)
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert names or path.name == "__init__.py", "no __all__"
    assert [name for name in names if name in defined and not ast.get_docstring(defined[name])] == []
    known = set(defined) | {node.id for node in walk(path, ast.Name) if isinstance(node.ctx, ast.Store)}
    known |= {alias.asname or alias.name for node in walk(path, ast.ImportFrom) for alias in node.names}
    assert set(names) <= known


def test_the_map_shows_what_is_there() -> None:
    """Every file of the three packages and no other; `python tools/map.py` draws it anew."""
    spec = importlib.util.spec_from_file_location("map", ROOT / "tools/map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs/architecture.md").read_text()
    assert page.partition("## The map\n\n```text\n")[2].partition("```")[0] == module.drawn()


def test_the_floors_are_those_of_the_page() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    block = page.partition("## Floors of `swquant`")[2].partition("```text\n")[2].partition("\n```")[0]
    shown = [set(line.split(" · ")) for line in reversed(block.splitlines())]
    assert shown == [layer for layer in LAYERS if layer != {"__init__", "__main__"}]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_names_on_the_pages_exist(page: str) -> None:
    """Files and dotted names in backticks."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for name in re.findall(r"`((?:calibrationless|exporters|swquant|tests|tools|docs|data|benchmarks)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:calibrationless|exporters|swquant)\.[\w.]+)`", text):
        module, _, last = name.rpartition(".")
        if (
            not ROOT.joinpath(*name.split(".")).exists()
            and not ROOT.joinpath(*name.split(".")).with_suffix(".py").exists()
        ):
            assert hasattr(importlib.import_module(module), last), name
