"""Pages that are written from code stand as the code says; the README shows what it must."""

import importlib.util
from pathlib import Path

import pytest

import redline

ROOT = Path(__file__).resolve().parent.parent


def test_the_metrics_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("render_metrics", ROOT / "docs" / "render_metrics.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text() == page.render(), "run: python docs/render_metrics.py"


def test_every_monitor_and_controller_has_a_row_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for module in (redline.monitors, redline.controllers):
        for name in module.__all__:
            assert name == "default_monitors" or f"| `{name}` |" in readme, name


def test_links_of_the_readme_lead_somewhere():
    import re

    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_links_of_the_page_on_trainers_lead_somewhere_and_its_snippets_are_python():
    import re

    page = ROOT / "docs" / "trainers.md"
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        compile(snippet, "docs/trainers.md", "exec")
        for module, names in re.findall(r"from (redline\S*) import (.+)", snippet):
            pytest.importorskip(module, exc_type=ImportError)  # where its trainer is not installed
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), name


def test_the_sink_shown_in_the_readme_is_the_one_that_runs():
    readme = (ROOT / "README.md").read_text()
    example = (ROOT / "examples" / "custom_sink.py").read_text()
    shown = readme.split("class CsvSink", 1)[1].split("```", 1)[0].strip()
    assert shown in example


def test_the_evidence_page_is_up_to_date_and_has_every_study():
    spec = importlib.util.spec_from_file_location("render_evidence", ROOT / "docs" / "render_evidence.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text() == page.render(), "run: python docs/render_evidence.py"
    studies = {
        path.stem for path in (ROOT / "examples" / "studies").glob("*.py") if "study = Study(" in path.read_text()
    }
    assert studies == set(page.STUDIES)
    for name in studies:
        assert (ROOT / "tests" / "studies" / f"test_{name}.py").exists(), name


def test_the_claims_of_the_evidence_page_are_those_of_the_studies_on_their_results():
    """Whoever changes a threshold renders the page anew from the same results."""
    import json
    import sys

    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        for kept in (ROOT / "docs" / "evidence").glob("*.json"):
            page = json.loads(kept.read_text())
            study = importlib.import_module(kept.stem).study
            assert [vars(claim) for claim in study.claims(page["results"])] == page["claims"], kept.stem
    finally:
        sys.path.pop(0)
