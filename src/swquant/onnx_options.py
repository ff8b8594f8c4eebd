"""The options of `export`, declared once, as `options` does for `compress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from exporters.errors import SwquantError

__all__ = ["ExportOptions", "export_help"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "graph": ("dynamo",),
    "precision": ("fp32",),
    "accuracy_level": (0,),
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ExportOptions:
    """What `export` can be told. Raises SwquantError for values that it does not know."""

    graph: str = _option("dynamo", "Where the graph comes from: dynamo (torch's exporter, any architecture).")
    precision: str = _option("fp32", "Of activations, scales and dense weights: fp32.")
    accuracy_level: int = _option(0, "Arithmetic of the 4-bit products: 0 (float).")

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                flag = "--" + name.replace("_", "-")
                raise SwquantError(f"{flag} {value} is not one of: {', '.join(map(str, known))}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_help(name: str) -> str:
    """The text of one option, for `--help`."""
    return next(str(item.metadata["help"]) for item in fields(ExportOptions) if item.name == name)
