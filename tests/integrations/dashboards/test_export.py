"""``redline dashboards export``: what it writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from grafana_queries import FILES

from redline import ConfigurationError
from redline.integrations.cli import main
from redline.integrations.dashboards import DEFAULT_TARGET, export

WRITTEN = {
    "compose.yaml",
    "grafana/dashboards/redline.json",
    "grafana/provisioning/dashboards/redline.yml",
    "grafana/provisioning/datasources/redline.yml",
    "prometheus/alerts.yml",
    "prometheus/prometheus.yml",
    "prometheus/recording.yml",
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def targets(folder: Path) -> list[str]:
    configuration = yaml.safe_load((folder / "prometheus" / "prometheus.yml").read_text())
    return configuration["scrape_configs"][0]["static_configs"][0]["targets"]


def test_it_writes_what_the_package_carries(tmp_path: Path):
    written = export(tmp_path / "a" / "b")
    assert {str(path) for path in written} == WRITTEN
    assert files(tmp_path / "a" / "b") == files(FILES)
    assert targets(tmp_path / "a" / "b") == [DEFAULT_TARGET]


def test_targets_are_filled_in_and_nothing_else_is_touched(tmp_path: Path):
    asked = ["gpu-1.cluster:9108", "gpu-1.cluster:9109", "[::1]:80"]
    export(tmp_path, asked)
    assert targets(tmp_path) == asked
    changed = {name for name, content in files(tmp_path).items() if content != (FILES / name).read_bytes()}
    assert changed == {"prometheus/prometheus.yml"}


@pytest.mark.parametrize(
    "target",
    ["", "localhost", ":9108", "http://localhost:9108", "localhost:9108/metrics", "localhost:0", "localhost:70000",
     "localhost:port", 'a"b:1', "a b:1"],
)  # fmt: skip
def test_what_is_no_target_is_refused_and_nothing_is_written(tmp_path: Path, target: str):
    with pytest.raises(ConfigurationError, match=r"as a target; expected host:port .* such as 127\.0\.0\.1:9108"):
        export(tmp_path / "new", ["localhost:1", target])
    assert not (tmp_path / "new").exists()


def test_no_target_at_all_is_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="got no target; expected at least one"):
        export(tmp_path, [])


def test_what_was_changed_is_not_overwritten(tmp_path: Path):
    export(tmp_path)
    alerts = tmp_path / "prometheus" / "alerts.yml"
    alerts.write_text("groups: []\n")
    (tmp_path / "compose.yaml").unlink()
    with pytest.raises(
        ConfigurationError, match=r"prometheus/alerts\.yml is there already and differs.*another folder"
    ):
        export(tmp_path)
    assert alerts.read_text() == "groups: []\n"
    assert not (tmp_path / "compose.yaml").exists()


def test_writing_the_same_again_is_fine(tmp_path: Path):
    export(tmp_path)
    before = files(tmp_path)
    export(tmp_path)
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot be written \(.*\); expected a folder"):
        export(tmp_path / "file" / "folder")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path):
    (tmp_path / "compose.yaml").mkdir()
    with pytest.raises(ConfigurationError, match=r"cannot be written \(.*\); expected a folder"):
        export(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_servers_may_read_what_is_written(tmp_path: Path):
    """They run as users of their own; what is written has the permissions that the user's other files get."""
    mask = os.umask(0o022)
    try:
        export(tmp_path)
    finally:
        os.umask(mask)
    for name in WRITTEN:
        assert (tmp_path / name).stat().st_mode & 0o044 == 0o044


def test_the_command_lists_the_files_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = tmp_path / "watch"
    assert main(["dashboards", "export", str(where), "--target", "a:1", "--target", "b:2"]) == 0
    said = capsys.readouterr().out
    for name in WRITTEN:
        assert str(where / name) in said
    assert f"docker compose -f {where / 'compose.yaml'} up -d" in said
    assert targets(where) == ["a:1", "b:2"]


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["dashboards", "export", str(tmp_path), "--target", "http://a:1"])
    assert "got 'http://a:1' as a target; expected host:port" in capsys.readouterr().err


def test_the_servers_find_each_other_and_are_on_this_machine_only():
    services = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]
    source = yaml.safe_load((FILES / "grafana/provisioning/datasources/redline.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((FILES / "grafana/provisioning/dashboards/redline.yml").read_text())["providers"][0]
    configuration = yaml.safe_load((FILES / "prometheus/prometheus.yml").read_text())
    assert {service["network_mode"] for service in services.values()} == {"host"}
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert source["url"] == "http://127.0.0.1:9090"
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert source["jsonData"]["timeInterval"] == configuration["global"]["scrape_interval"]
    assert "uid" not in source
    mounted = dict(volume.split(":")[:2][::-1] for volume in services["grafana"]["volumes"])
    assert mounted[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounted["/etc/grafana/provisioning"] == "./grafana/provisioning"
    for service in services.values():
        assert service["image"].rpartition(":")[2][-1].isdigit(), "an image is named by its version"
