"""Long records: read in memory that does not grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recorded_runs import recorded

PEAK = """
import json, sys
import redline
from redline.integrations.html import report_page
from redline.integrations.record import read
def memory(which):  # MiB
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = memory("VmRSS:")
record = read(sys.argv[1])
report = record.report()
page = report_page(record)
after = memory("VmHWM:")
points = max(len(curve.points()) for curve in record.curves.values())
print(json.dumps({"mib": after - before, "steps": report.steps, "points": points, "page": len(page),
                  "highest": report.step_sizes.highest, "at": report.step_sizes.highest_step}))
"""


def long_record(path: Path, mib: int) -> int:
    """A record of so many MiB, made from a line of a real run; r is 1,000 at one step. Gives its steps."""
    recorded(path.with_name("short.jsonl"), 11, every=10, lr=1e-3)
    header, first, line = path.with_name("short.jsonl").read_text().splitlines()[:3]
    template = json.loads(line)
    spectra = template["gauges"]["redline_weight_spectral_norm"]
    template["gauges"]["redline_weight_spectral_norm"] = [
        [[f"blocks.{block}.weight"], spectra[0][1]] for block in range(60)
    ]
    template.pop("interventions", None)
    step, size = 1, 0
    with path.open("w") as file:
        file.write(header + "\n" + first + "\n")
        while size < mib * 2**20:
            for series in template["gauges"].values():
                for _, points in series:
                    points[:] = [[step + at, 0.5] for at in range(len(points))]
            template["gauges"]["redline_normalized_step_size"] = [
                [[], [[step + at, 1e3 if step + at == 5_001 else 0.5] for at in range(10)]]
            ]
            template["step"] = step + 9
            template["counts"] = {"redline_steps_total": [[[], step + 10]]}
            text = json.dumps(template) + "\n"
            size += len(text)
            file.write(text)
            step += 10
    return step


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak of memory")
@pytest.mark.parametrize("mib", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_it_is_read_in_bounded_memory(tmp_path: Path, mib: int):
    steps = long_record(tmp_path / "run.jsonl", mib)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "run.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=540)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["steps"] == steps
    assert (found["highest"], found["at"]) == (1e3, 5_001)
    assert found["points"] <= 4_100
    assert found["page"] < 4 * 2**20
    assert found["mib"] < 60, "whatever the size of the file"
