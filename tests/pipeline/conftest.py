"""Fixtures of exported detectors, shared with the tests of `earlyexit_ssd.deploy`."""

import copy

import pytest

from earlyexit_ssd.pipeline import export
from tests.deploy.conftest import folder, model, onnx_file, photos, staged_folder

__all__ = ["folder", "model", "onnx_file", "photos", "staged_folder"]


@pytest.fixture(scope="module")
def _traced() -> dict:
    return {}


@pytest.fixture
def traced_once(_traced, monkeypatch) -> None:
    """Trace each network once for all tests of a module. Each test gets a copy of its graphs."""
    trace = export.build_segments

    def segments(model):
        needs = (model.router.needs(index) for index in range(model.num_early_exits))
        key = tuple(zip(model.exit_names, model.empty, needs, strict=False))
        if key not in _traced:
            _traced[key] = trace(model)
        return copy.deepcopy(_traced[key])

    monkeypatch.setattr(export, "build_segments", segments)
