"""Settings of a cell reach its services from the file and from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.up import UpOptions, _environment
from cluster.placement_host import placement_settings
from cluster.repair.settings import repair_settings
from protocol.config import load

FILE = """
node_down_after_s = 4.5
node_out_after_s = 60
node_refusing_out_after_s = 7200
"""


def of_services(data: Path) -> tuple[float, float, float]:
    settings = load(data=data)  # as each service does
    repair = repair_settings(settings)
    return (
        placement_settings(settings).down_after_s,
        repair.out_after_s,
        repair.refusing_out_after_s,
    )


@pytest.mark.parametrize("how", ["found in the directory", "named", "in the environment"])
def test_times_to_down_and_out_reach_services_wherever_they_are_started(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    name = "haversack.toml" if how == "found in the directory" else "cell.toml"
    (here / name).write_text(FILE, encoding="ascii")
    monkeypatch.chdir(here)
    monkeypatch.delenv("HAVERSACK_CONFIG", raising=False)
    if how == "in the environment":
        monkeypatch.setenv("HAVERSACK_CONFIG", name)
    options = UpOptions(tmp_path, config=Path(name) if how == "named" else None)
    for variable, value in _environment(options, tmp_path).items():
        if variable.startswith("HAVERSACK_"):
            monkeypatch.setenv(variable, value)
    monkeypatch.chdir(elsewhere)
    assert of_services(tmp_path) == (4.5, 60.0, 7200.0)
    monkeypatch.setenv("HAVERSACK_NODE_OUT_AFTER_S", "90")
    assert of_services(tmp_path) == (4.5, 90.0, 7200.0), "the environment goes before the file"
