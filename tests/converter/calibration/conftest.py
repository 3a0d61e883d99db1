"""Fixtures of the tests of calibration."""

import pytest

from converter.solvers import feedback


@pytest.fixture
def reference_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the reference solver: these tests are about calibration, not the native library."""
    monkeypatch.setattr(feedback, "NativeFeedback", feedback.ReferenceFeedback)
