"""A world with what was planted and one without, and the studies of both: made once per session. Do not change them."""

from __future__ import annotations

import pytest
from support.study_world import OPTIONS, World, make_world

import swquant
from calibrationless import CPU
from swquant.checkpoints.open import open_checkpoint
from swquant.progress import Progress
from swquant.study.options import StudyOptions
from swquant.study.pipeline import Study, _load, _windows
from swquant.study.subject import Subject


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("planted"), planted=True)


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("control"), planted=False)


@pytest.fixture(scope="session")
def study(planted: World) -> Study:
    return swquant.study(planted.folder, planted.text.read_text(), planted.folder.parent / "study", **OPTIONS)


@pytest.fixture(scope="session")
def of_control(control: World) -> Study:
    return swquant.study(
        control.folder, control.text.read_text(), control.folder.parent / "study", quick=True, **OPTIONS
    )


@pytest.fixture
def subject(planted: World) -> Subject:
    options = StudyOptions(**OPTIONS)
    with open_checkpoint(planted.folder) as checkpoint:
        return _load(checkpoint, _windows(checkpoint, planted.text.read_text(), options), options, CPU, Progress())
