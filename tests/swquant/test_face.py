"""`swquant.detect` is a function, and a folder beside it: the name stays the function's, whatever is imported first."""

from __future__ import annotations

import json
import subprocess
import sys

from support.paths import PROJECT

VERBS = ("compress", "detect", "evaluate", "export", "push", "study")
# Each module is the first that a new swquant imports, in one process, because torch takes seconds to load.
FIRST = """
import importlib, json, sys
verbs, modules = map(json.loads, sys.argv[1:])
bound = {}
for module in modules:
    for name in [name for name in sys.modules if name.partition(".")[0] == "swquant"]:
        del sys.modules[name]
    importlib.import_module(module)
    swquant = sys.modules["swquant"]
    bound[module] = [verb for verb in verbs if verb in vars(swquant)]
    if module.count(".") == 1 or module == modules[-1]:
        assert all(type(getattr(swquant, verb)).__name__ == "function" for verb in verbs), module
print(json.dumps(bound))
"""


def test_a_verb_stays_a_function_whichever_module_of_its_folder_is_imported_first() -> None:
    paths = [path for verb in VERBS for path in sorted((PROJECT / "swquant" / verb).rglob("*.py"))]
    modules = [".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    assert {f"swquant.{verb}" for verb in VERBS} < set(modules)
    command = [sys.executable, "-c", FIRST, json.dumps(VERBS), json.dumps(modules)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {module: [] for module in modules}
