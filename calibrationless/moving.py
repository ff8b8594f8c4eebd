"""Values made of tensors (evidence, rounded weights, what a probe saw) on another device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["CPU", "moved"]

CPU = torch.device("cpu")

T = TypeVar("T")


def moved(value: T, device: torch.device | str) -> T:
    """The value with every tensor in it on `device`: of dataclasses, tuples, lists and dicts those inside. No tensor is
    copied that is there already."""
    result: T = _moved(value, torch.device(device))
    return result


def _moved(value: Any, device: torch.device) -> Any:
    match value:
        case Tensor():
            return value.to(device)
        case dict():
            return {key: _moved(item, device) for key, item in value.items()}
        case tuple() | list():
            return type(value)(_moved(item, device) for item in value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{item.name: _moved(getattr(value, item.name), device) for item in fields(value)})
    return value
