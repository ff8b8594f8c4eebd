"""Experiment 1: how to identify super weights (the paper's Figures 3 and 10).

The largest |input| and |output| of every layer's down projection on one prompt. A super weight is a spike in both.
"""

from __future__ import annotations

from swquant.detect.section import describe
from swquant.drawing.section import Section
from swquant.study.changes import Change
from swquant.study.measuring import Measured
from swquant.study.subject import Subject

__all__ = ["changes", "conclude"]


def changes(subject: Subject) -> tuple[Change, ...]:
    """Nothing needs measuring: detection has seen it all."""
    return ()


def conclude(subject: Subject, measured: Measured) -> Section:
    """Every layer's maxima, and the super weights and cancellers with their evidence."""
    return describe(subject.found)
