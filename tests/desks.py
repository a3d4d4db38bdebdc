"""Desks as fixtures: `pytest_plugins = ("tests.desks",)`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.user import sit_at_desk


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk with a recipe and data."""
    sit_at_desk(tmp_path, monkeypatch)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk with a finished run."""
    sit_at_desk(tmp_path, monkeypatch, trained=True)
