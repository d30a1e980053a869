"""Settings: where a value comes from, and that a wrong one is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol import config
from protocol.errors import ConfigInvalid


@pytest.fixture(autouse=True)
def _bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(config.os.environ):
        if name.startswith(config.ENV_PREFIX):
            monkeypatch.delenv(name)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "haversack.toml"
    path.write_text(text)
    return path


def test_defaults_are_what_the_readme_says() -> None:
    settings = config.load()
    assert (settings.nodes, settings.scheme, settings.host, settings.port) == (
        9,
        "rs-6-3",
        "127.0.0.1",
        8420,
    )
    assert settings.server == "http://127.0.0.1:8420"


def test_argument_wins_over_environment_wins_over_file_wins_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _file(tmp_path, "port = 1\nnodes = 2\nhost = 'file'\n")
    monkeypatch.setenv("HAVERSACK_PORT", "3")
    monkeypatch.setenv("HAVERSACK_HOST", "environment")
    settings = config.load(port=4)
    assert (settings.port, settings.host, settings.nodes) == (4, "environment", 2)


def test_argument_of_none_is_an_argument_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAVERSACK_PORT", "3")
    assert config.load(port=None).port == 3


def test_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.toml"
    other.write_text("nodes = 12\n")
    monkeypatch.setenv("HAVERSACK_CONFIG", str(other))
    assert config.load().nodes == 12


def test_labels_come_as_a_table_or_as_a_list_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _file(tmp_path, '[node_labels.node-01]\nrack = "r1"\nhost = "h1"\n')
    assert config.load().node_labels["node-01"].rack == "r1"
    monkeypatch.setenv("HAVERSACK_NODE_LABELS", '["node-02:rack=r2,weight=2"]')
    label = config.load().node_labels["node-02"]
    assert (label.rack, label.host, label.weight) == ("r2", "", 2.0)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.load().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "'prot' in haversack.toml is not a setting; did you mean port?"),
        ("port = 70000", "'port' in haversack.toml: Input should be less than or equal to 65535"),
        ("scheme = 'rs6-3'", "'scheme' in haversack.toml: String should match pattern"),
        ("lease_s = 0.5", "node_down_after_s < lease_s: one slow answer is not a death"),
        ("node_out_after_s = 1", "node_out_after_s must not be shorter than node_down_after_s"),
        ("body_bytes_max = 1", "body_bytes_max must be at least"),
        ("port = ", "settings file haversack.toml: Invalid value"),
        ("[node_labels.node-01]\ncolour = 'red'", r"'node_labels' in haversack.toml[node-01]"),
        ("[node_labels.NODE]\nrack = 'red'", "is not a node id"),
        ("server = 'ftp://x'", "'server' in haversack.toml"),
        ("lease_s = nan", "'lease_s' in haversack.toml"),
    ],
)
def test_bad_file_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    _file(tmp_path, text)
    with pytest.raises(ConfigInvalid) as caught:
        config.load()
    assert message in str(caught.value)


def test_named_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"settings file .*absent\.toml does not exist"):
        config.load(config=tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HAVERSACK_PROT", "1", "environment variable HAVERSACK_PROT is not a setting"),
        ("HAVERSACK_PORT", "x", "HAVERSACK_PORT: Input should be a valid integer"),
        ("HAVERSACK_NODE_LABELS", '["node-01"]', "is not NODE:rack=R,host=H,weight=W"),
        ("HAVERSACK_NODE_LABELS", "[", "lists and tables are written as JSON"),
    ],
)
def test_bad_environment_is_refused_with_its_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigInvalid) as caught:
        config.load()
    assert message in str(caught.value)


def test_bad_argument_is_refused_with_its_option() -> None:
    with pytest.raises(ConfigInvalid, match="--active-requests-max"):
        config.load(active_requests_max=0)
