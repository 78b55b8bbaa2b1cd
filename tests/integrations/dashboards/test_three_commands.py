"""From nothing to a dashboard with data: the README's three commands, up to Grafana's door.

The first, which installs, is run by .ci/run. Docker and Grafana are not available to tests: in the container's place,
Prometheus is started here by the compose file's own command line, on the files that the second command wrote.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from grafana_queries import interpolated, panel_queries
from prometheus_server import PrometheusServer, eventually, free_port, program

from redline.integrations.dashboards import export

ROOT = Path(__file__).resolve().parents[3]
RUNNER = ROOT / "tests" / "shared" / "served_run.py"
OPTIONAL = re.compile(r"exact|binding|committed|step_scale|interventions|budget|folded")
"""What the demo does not show: it has few layers, no controllers and no budget, and measures by the bound alone."""


def commands() -> list[str]:
    """As the README has them."""
    section = (ROOT / "README.md").read_text().split("### Prometheus and Grafana", 1)[1]
    return section.split("```console\n", 1)[1].split("```", 1)[0].strip().splitlines()


def redline(command: str, *more: str, where: Path) -> subprocess.Popen[str]:
    """A command of the README, by the program that was installed."""
    name, *arguments = shlex.split(command)
    assert name == "redline"
    installed = Path(sysconfig.get_path("scripts")) / name
    return subprocess.Popen(
        [installed, *arguments, *more],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def started_as_composed(folder: Path) -> PrometheusServer:
    """Prometheus with the flags of the compose file, its volumes in their places on this machine."""
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["prometheus"]
    places = {}
    for volume in service["volumes"]:
        source, inside = volume.split(":")[:2]
        places[inside] = folder / source if source.startswith("./") else folder / "data"
    flags = dict(flag.split("=", 1) for flag in service["command"])
    configuration, data = Path(flags.pop("--config.file")), flags.pop("--storage.tsdb.path")
    del flags["--web.listen-address"]  # a free port here
    return PrometheusServer(
        places[str(configuration.parent)] / configuration.name,
        places[data],
        [f"{flag}={value}" for flag, value in flags.items()],
    )


def test_the_readme_has_three_commands():
    install, exports, run = commands()
    assert install == 'pip install -c constraints.txt -e ".[demo]"'
    assert exports == "redline dashboards export watch && docker compose -f watch/compose.yaml up -d"
    assert run == "redline demo"


def test_the_three_commands_fill_the_dashboard(tmp_path: Path):
    program("prometheus")
    pytest.importorskip("sklearn")
    _, second, third = commands()
    port = str(free_port())

    exports, _, compose = second.partition(" && ")
    exporting = redline(exports, "--target", f"127.0.0.1:{port}", where=tmp_path)
    said, _ = exporting.communicate(timeout=60)
    assert exporting.returncode == 0, said
    folder = tmp_path / "watch"
    assert compose == f"docker compose -f {folder.relative_to(tmp_path) / 'compose.yaml'} up -d"
    assert f"{compose}\n" in said

    # Looked at more often than every 5 seconds, since on a fast machine the first of its runs lasts little longer.
    configuration = folder / "prometheus" / "prometheus.yml"
    configuration.write_text(configuration.read_text().replace("_interval: 5s", "_interval: 200ms"))
    server = started_as_composed(folder)
    start = time.time()
    try:
        demo = redline(third, "--port", port, where=tmp_path)
        said, _ = demo.communicate(timeout=600)
        assert demo.returncode == 0, said
        end = time.time()

        runs = server.query("count by (run) (last_over_time(redline_run_info[5m]))")
        assert {one["metric"]["run"] for one in runs} == {"digits-transformer", "byte-level-language-model"}
        for query in panel_queries():
            if OPTIONAL.search(query.expression):
                continue
            asked = interpolated(
                query.expression,
                {"run": sorted(one["metric"]["run"] for one in runs), "instance": [f"127.0.0.1:{port}"]},
                scrape=0.2,
                step=0.2,
                span=end - start + 1,
            )
            found = (
                [[one["value"]] for one in server.query(asked)]
                if query.instant
                else [one["values"] for one in server.query_range(asked, start, end, 0.2)]
            )
            assert any(math.isfinite(float(value)) for values in found for _, value in values), query
    finally:
        server.stop()


def test_what_is_exported_finds_a_run_as_it_is(tmp_path: Path):
    """Nothing is changed in the configuration: scrapes every five seconds, at the target that was given."""
    program("prometheus")
    port = free_port()
    export(tmp_path, [f"127.0.0.1:{port}"])
    server = started_as_composed(tmp_path)
    run = subprocess.Popen([sys.executable, RUNNER, str(port), "mine", "1"], stdin=subprocess.PIPE)
    try:
        (found,) = eventually(lambda: server.query('redline_run_info{job="redline"}'), "the run is scraped")
        assert found["metric"]["run"] == "mine"
        assert found["metric"]["instance"] == f"127.0.0.1:{port}"
    finally:
        run.communicate(timeout=60)
        server.stop()
