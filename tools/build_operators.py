"""Hatchling's hook: compiles the operator library into the wheel, or says why the wheel goes without it.

With a compiler the wheel is `py3-none-linux_<machine>` (the library uses ONNX Runtime's C interface and no Python), in
an editable install the library lands beside its sources. Without one the wheel is pure: exported models still run,
through the function that they carry.
"""

from __future__ import annotations

import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class OperatorsHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        sys.path.insert(0, self.root)
        try:
            from exporters.ops.build import BuildError, build_library
        finally:
            sys.path.remove(self.root)
        try:
            library = build_library()
        except BuildError as error:
            self.app.display_warning(f"swquant without its operator library: {error}")
            self.app.display_warning("ONNX models will run through the function they carry; see `swquant doctor`.")
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
