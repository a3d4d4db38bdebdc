"""The table of docs/attention.md is what the registry says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from longtrain.attention import Needs
from longtrain.kernels import capabilities
from longtrain.kernels.language import has_triton


@pytest.mark.skipif(not has_triton(), reason="without Triton its kernels refuse everything")
def test_the_table_is_generated_from_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    assert page.count(capabilities.BEGIN) == page.count(capabilities.END) == 1
    command = "python -m longtrain.kernels.capabilities docs/attention.md"
    assert page == capabilities.with_table(page), f"write it anew: {command}"


@dataclass
class Narrow:
    """Runs on CPUs only and has no dropout."""

    name: str = "narrow"

    def refuses(self, needs: Needs) -> list[str]:
        return ["CPUs only"] * (needs.device != "cpu") + ["drops nothing"] * ("dropout" in needs.features)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    backward = forward


def test_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "kernels", lambda: (Narrow(),))
    rows = dict(line.strip("| ").split(" | ") for line in capabilities.table().splitlines()[2:])
    assert rows["CUDA GPUs"] == "CPUs only"
    assert rows["CPUs"] == rows["causal"] == rows["sinks, with gradient"] == "yes"
    assert rows["dropout"] == "drops nothing"
    page = f"before\n{capabilities.BEGIN}\nold\n{capabilities.END}\nafter\n"
    assert capabilities.with_table(page) == f"before\n{capabilities.BEGIN}\n\n{capabilities.table()}\n\n{capabilities.END}\nafter\n"


def test_every_feature_of_a_spec_has_a_row() -> None:
    asked = {feature for needs in capabilities.ROWS.values() for one in needs for feature in one.features}
    assert asked == {"softcap", "alibi", "bias", "dropout"}
    kinds = {kind for needs in capabilities.ROWS.values() for one in needs for kind in one.kinds}
    assert kinds == {"full", "causal", "window", "band"}
