"""All rules together: what they hand out, in which order, and the page that lists them."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
from reports import report_of, tally

from redline.findings import RULES, Rule, findings_of, thresholds
from redline.report import StabilityReport

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture
def troubled() -> StabilityReport:
    """A run in which much went wrong."""
    return report_of(
        400,
        r=[(step, 2.5 if step < 30 else 0.2) for step in range(0, 400, 10)],
        losses=[(step, 2.3 if step < 300 else 4.0) for step in range(400)],
        values={("redline_nonfinite_total", "loss"): 2.0, "redline_monitoring_ratio": 0.2},
        interventions=[tally("StepClamp", "scale", 200), tally("Guard", "withhold", 9)],
    )


def test_the_worst_come_first_and_each_rule_speaks_once(troubled: StabilityReport):
    levels = [one.level for one in troubled.verdicts]
    assert levels == sorted(levels, key=["bad", "watch", "good"].index)
    rules = [one.rule for one in troubled.verdicts]
    assert len(set(rules)) == len(rules) >= 6
    assert rules[0] == "values_not_finite"
    assert findings_of(troubled) == troubled.verdicts


def test_each_says_what_was_seen_why_it_matters_and_what_to_try(troubled: StabilityReport):
    for finding in troubled.verdicts:
        assert finding.seen.endswith(".")
        assert finding.why.endswith(".")
        assert finding.advice.endswith(".")
        assert finding.text == f"{finding.seen} {finding.why} {finding.advice}"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_finding_carries_the_name_of_its_rule(rule: Rule, troubled: StabilityReport):
    assert f'"{rule.__name__}"' in inspect.getsource(rule)
    found = rule(troubled)
    assert found is None or found.rule == rule.__name__


def test_findings_are_plain_data_with_their_text(troubled: StabilityReport):
    plain = troubled.to_dict()["verdicts"][0]
    assert plain == {
        "level": "bad",
        "rule": "values_not_finite",
        "seen": troubled.verdicts[0].seen,
        "why": troubled.verdicts[0].why,
        "advice": troubled.verdicts[0].advice,
        "text": troubled.verdicts[0].text,
    }


def test_the_page_of_findings_is_up_to_date_and_has_every_rule_and_figure():
    spec = importlib.util.spec_from_file_location("render_findings", DOCS / "render_findings.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.render()
    assert page.PAGE.read_text() == text, "run: python docs/render_findings.py"
    for rule in RULES:
        assert f"| `{rule.__name__}` |" in text
    for name in vars(thresholds):
        if name.isupper():
            assert f"| `{name}` | {getattr(thresholds, name)} |" in text
