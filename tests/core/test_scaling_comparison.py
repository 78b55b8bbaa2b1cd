"""Comparing the spectra of two widths."""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import rich
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_models import (
    INF,
    LLAMA_BLOCK,
    LONG,
    NAN,
    Experts,
    quiet,
    seeded,  # noqa: F401 around every test
)
from torch import nn

import redline
from redline import ConfigurationError
from redline.integrations.demo.models import LlamaLM
from redline.readings import RunInfo, Series, Snapshot
from redline.scaling import classify, compare_spectra

SIGMA = "redline_weight_spectral_norm"


def first_column(lines: list[str], heading: str, following: str) -> str:
    """All that stands in the first column, folded lines put together again."""
    (head,) = (line for line in lines if line.startswith(heading))
    edge = head.index(following)
    return "".join(line[:edge].strip() for line in lines[lines.index(head) + 1 :])


def snapshot_of(values: Mapping[str, float], metric: str = SIGMA) -> Snapshot:
    run = RunInfo("run-1", "0.1", "float32", "single", 1)
    return Snapshot(7, 0.0, run, {Series(metric, (layer,)): value for layer, value in values.items()}, {})


def trained(width: int) -> tuple[nn.Module, redline.Session]:
    """A small model and the session of one step of it, closed."""
    torch.manual_seed(width)
    model = nn.Sequential(OrderedDict(first=nn.Linear(5, width), second=nn.Linear(width, width)))
    optimizer = torch.optim.AdamW(quiet(model, base_width=16, width=width))
    with redline.attach(model, optimizer, monitors=[redline.WeightSpectrum(1)]) as session:
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
    return model, session


def test_sessions_snapshots_and_mappings_compare_alike():
    (narrow, one), (wide, other) = trained(16), trained(64)
    exact = [
        {
            name: torch.linalg.svdvals(p.detach().double())[0].item()
            for name, p in model.named_parameters()
            if p.dim() > 1
        }
        for model in (narrow, wide)
    ]
    by_session = compare_spectra(one, other)
    assert by_session == compare_spectra(one.latest, other.latest) == compare_spectra(one, other.latest)
    assert by_session == compare_spectra(one.latest.layers(SIGMA), other.latest.layers(SIGMA))
    for found in (by_session, compare_spectra(one, exact[1]), compare_spectra(*exact)):
        assert {layer.layer for layer in found.layers} == {"first.weight", "second.weight"}
        for layer in found.layers:
            reference, run = (sigma[layer.layer] for sigma in exact)
            assert layer.reference == pytest.approx(reference, rel=1e-3)
            assert layer.run == pytest.approx(run, rel=1e-3)
            assert layer.ratio == pytest.approx(run / reference, rel=1e-3)


def test_figures_and_verdict():
    found = compare_spectra({"a": 2.0, "b": 4.0, "c": 1.0}, {"a": 2.0, "b": 3.0, "c": 1.5}, tolerance=0.25)
    assert [(one.layer, one.reference, one.run, one.ratio) for one in found.layers] == [
        ("c", 1.0, 1.5, 1.5),
        ("b", 4.0, 3.0, 0.75),
        ("a", 2.0, 2.0, 1.0),
    ]
    assert (found.median_ratio, found.tolerance, found.matches, found.unmatched) == (1.0, 0.25, False, ())


def test_the_worst_match_comes_first_on_either_side():
    found = compare_spectra(dict.fromkeys("abcd", 1.0), {"a": 1.9, "b": 0.5, "c": 1.0, "d": 2.1})
    assert [one.layer for one in found.layers] == ["d", "b", "a", "c"]
    assert found.median_ratio == pytest.approx(1.45)


@pytest.mark.parametrize(
    ("run", "tolerance", "matches"),
    [
        ({"a": 1.0, "b": 1.0}, 0.0, True),
        ({"a": 1.25, "b": 0.75}, 0.25, True),
        ({"a": 1.26, "b": 1.0}, 0.25, False),
        ({"a": 1.0, "b": 0.74}, 0.25, False),
        ({"a": 1.09, "b": 0.91}, None, True),
        ({"a": 1.11, "b": 1.0}, None, False),
        ({"a": 1.0, "b": 0.89}, None, False),
    ],
)
def test_a_match_is_every_layer_within_the_tolerance(run: dict[str, float], tolerance: float | None, matches: bool):
    given = {} if tolerance is None else {"tolerance": tolerance}
    assert compare_spectra({"a": 1.0, "b": 1.0}, run, **given).matches is matches


def test_layers_of_one_run_only_are_named_and_change_no_verdict():
    found = compare_spectra({"a": 1.0, "b": 1.0}, {"c": 9.0, "a": 1.0})
    assert [one.layer for one in found.layers] == ["a"]
    assert found.unmatched == ("b", "c")
    assert found.matches


@pytest.mark.parametrize(
    ("layers", "expected", "unmatched"),
    [
        (["head"], {"head"}, ()),
        ("head", {"head"}, ()),
        (["blocks.*.up"], {"blocks.0.up", "blocks.1.up"}, ()),
        (["blocks.*", "head"], {"blocks.0.up", "blocks.1.up", "head"}, ("blocks.2.up",)),
        ("blocks.?.up", {"blocks.0.up", "blocks.1.up"}, ("blocks.2.up",)),
        (None, {"blocks.0.up", "blocks.1.up", "head"}, ("blocks.2.up", "tail")),
    ],
)
def test_layers_can_be_chosen_by_name_and_pattern(layers: Any, expected: set[str], unmatched: tuple[str, ...]):
    deeper = "blocks.2.up" in unmatched
    reference = {"blocks.0.up": 1.0, "blocks.1.up": 1.0, "head": 1.0} | ({"blocks.2.up": 1.0} if deeper else {})
    found = compare_spectra(
        reference, {"tail": 1.0, "head": 5.0, "blocks.1.up": 1.0, "blocks.0.up": 1.0}, layers=layers
    )
    assert {one.layer for one in found.layers} == expected
    assert found.unmatched == unmatched
    assert found.matches is ("head" not in expected)


def test_the_matrix_like_layers_of_a_model_can_be_chosen_by_classify():
    """As its documentation says."""
    model = LlamaLM(32, layers=1)
    sigma = {name: 1.0 for name, p in model.named_parameters() if p.dim() > 1}
    chosen = [one.name for one in classify(model, 32).values() if one.kind == "matrix-like"]
    found = compare_spectra(sigma, {**sigma, "embedding.weight": 5.0}, layers=chosen)
    assert {one.layer for one in found.layers} == LLAMA_BLOCK | {"head.weight"}
    assert found.matches


def test_stacked_experts_can_be_chosen_by_classify():
    """Their matrices are measured as ``name[e]``, which the parameter's name has to stand for."""
    model = Experts(16)
    optimizer = torch.optim.AdamW(quiet(model, base_width=16, width=16))
    with redline.attach(model, optimizer, monitors=[redline.WeightSpectrum(1)]) as session:
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    chosen = [one.name for one in classify(model, 16).values() if one.kind == "matrix-like"]
    found = compare_spectra(session, session, layers=chosen)
    experts = {f"{name}[{e}]" for name in ("up", "down") for e in range(4)}
    assert {one.layer for one in found.layers} == experts | {"router.weight"}


def test_a_matrix_of_a_stack_can_be_chosen_by_its_name():
    sigma = {"up[0]": 1.0, "up[1]": 1.0}
    assert [one.layer for one in compare_spectra(sigma, sigma, layers=["up[1]"]).layers] == ["up[1]"]
    assert {one.layer for one in compare_spectra(sigma, sigma, layers=["up*"]).layers} == {"up[0]", "up[1]"}


def test_a_matrix_that_fell_to_zero_does_not_match_and_comes_first():
    found = compare_spectra({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 0.0, "c": 3.0})
    assert [(one.layer, one.ratio) for one in found.layers] == [("b", 0.0), ("c", 3.0), ("a", 1.0)]
    assert not found.matches


def test_a_matrix_that_was_zero_does_not_match_and_comes_first():
    found = compare_spectra({"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "c": 3.0})
    assert [(one.layer, one.ratio) for one in found.layers] == [("b", INF), ("c", 3.0), ("a", 1.0)]
    assert not found.matches


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_does_not_match_and_comes_first(value: float):
    for reference, run in itertools.permutations([{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": value}]):
        found = compare_spectra(reference, run)
        assert found.layers[0].layer == "b"
        assert not found.matches


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_one_nan_does_not_shift_the_median_of_the_others(order: tuple[str, ...]):
    """It may be NaN itself, or the others' median: no third number."""
    run = {"a": NAN, "b": 3.0, "c": 1.0}
    found = compare_spectra(dict.fromkeys(order, 1.0), {name: run[name] for name in order})
    assert math.isnan(found.median_ratio) or found.median_ratio == 2.0


sigmas = st.dictionaries(st.sampled_from("abcdefg"), st.floats(1e-6, 1e6), min_size=1)


@settings(deadline=None)
@given(reference=sigmas, run=sigmas, tolerance=st.floats(0, 1))
def test_comparisons_against_their_definition(reference: dict[str, float], run: dict[str, float], tolerance: float):
    common = reference.keys() & run.keys()
    if not common:
        with pytest.raises(ConfigurationError, match="no layer to compare"):
            compare_spectra(reference, run)
        return
    found = compare_spectra(reference, run, tolerance=tolerance)
    ratios = {name: run[name] / reference[name] for name in common}
    assert {one.layer: one.ratio for one in found.layers} == ratios
    assert set(found.unmatched) == reference.keys() ^ run.keys()
    assert found.matches == all(1 - tolerance <= ratio <= 1 + tolerance for ratio in ratios.values())
    assert found.median_ratio == statistics.median(ratios.values())
    off = [max(one.ratio, 1 / one.ratio) for one in found.layers]
    assert all(worse >= better * (1 - 1e-12) for worse, better in itertools.pairwise(off))


def test_it_is_plain_data():
    found = compare_spectra({"a": 1.0, "b": 2.0, "d": 1.0}, {"a": 1.0, "b": 3.0, "c": 1.0}, tolerance=0.25)
    assert json.loads(json.dumps(found.to_dict())) == {
        "layers": [
            {"layer": "b", "reference": 2.0, "run": 3.0, "ratio": 1.5},
            {"layer": "a", "reference": 1.0, "run": 1.0, "ratio": 1.0},
        ],
        "unmatched": ["d", "c"],
        "tolerance": 0.25,
        "median_ratio": 1.25,
        "matches": False,
    }
    _, session = trained(16)
    json.dumps(compare_spectra(session, session).to_dict())


@pytest.mark.parametrize(
    "empty", [{}, snapshot_of({}), snapshot_of({"a": 1.0}, "redline_update_spectral_norm")], ids=str
)
def test_spectra_that_were_not_measured_are_refused(empty: Any):
    for pair, what in (((empty, {"a": 1.0}), "reference"), (({"a": 1.0}, empty), "run")):
        with pytest.raises(ConfigurationError, match=f"got a {what} without spectra; expected {SIGMA}") as caught:
            compare_spectra(*pair)
        assert "redline.WeightSpectrum()" in str(caught.value)


def test_a_session_that_measured_no_spectra_is_refused():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with redline.attach(model, optimizer, monitors=[redline.StepHealth()]) as session:
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    with pytest.raises(ConfigurationError, match="got a run without spectra"):
        compare_spectra({"weight": 1.0}, session)


def test_nothing_in_common_is_refused():
    with pytest.raises(ConfigurationError, match="got no layer to compare") as caught:
        compare_spectra({"a": 1.0, "b": 1.0}, {"c": 1.0})
    assert "2 in the reference (such as 'a'), 1 in the run (such as 'c'); expected common names." in str(caught.value)


@pytest.mark.parametrize("layers", [["c"], [], "b*"])
def test_a_choice_that_leaves_nothing_is_refused(layers: Any):
    with pytest.raises(ConfigurationError, match=r"no layer to compare.*expected common names among layers="):
        compare_spectra({"a": 1.0}, {"a": 1.0, "b": 1.0}, layers=layers)


@pytest.mark.parametrize("tolerance", [-0.1, NAN])
def test_a_tolerance_that_nothing_can_meet_is_refused(tolerance: float):
    with pytest.raises(ConfigurationError, match="got tolerance="):
        compare_spectra({"a": 1.0}, {"a": 1.0}, tolerance=tolerance)


def test_the_comparison_prints_itself(written: Callable[[], list[str]]):
    found = compare_spectra(
        {"blocks.0.down.weight": 1.0, "blocks.1.down.weight": 2.0, "a": 1.0, "head.weight": 3.0},
        {"blocks.0.down.weight": 1.05, "blocks.1.down.weight": 1.0, "b[0]": 1.0, "head.weight": 3.0},
    )
    rich.print(found)
    lines = [" ".join(line.split()) for line in written()]
    title = " ".join(lines[: lines.index("layer reference run ratio")])
    assert title == "Top singular values: 2 of 3 match within 10%, the median ratio is 1"
    assert lines[lines.index("layer reference run ratio") + 1 :] == [
        "blocks.1.down.weight 2 1 ×0.5",
        "blocks.0.down.weight 1 1.05 ×1.05",
        "head.weight 3 3 ×1",
        "a only in one",
        "b[0] only in one",
    ]


def test_the_tolerance_is_printed_and_counts(written: Callable[[], list[str]]):
    rich.print(compare_spectra({"a": 1.0, "b": 1.0}, {"a": 1.2, "b": 1.0}, tolerance=0.25))
    assert "2 of 2 match within 25%" in " ".join(" ".join(written()).split())


def test_long_names_of_layers_are_folded_not_cut(written: Callable[[], list[str]]):
    sigma = {f"{LONG}.parametrizations.weight.original1": 1.0}
    rich.print(compare_spectra(sigma, sigma))
    lines = written()
    assert "…" not in "".join(lines)
    assert first_column(lines, "layer", "reference") == next(iter(sigma))


def test_values_that_are_not_finite_can_be_printed(written: Callable[[], list[str]]):
    rich.print(compare_spectra({"a": 1.0, "b": 0.0}, {"a": NAN, "b": 1.0}))
    assert any("nan" in line for line in written())


def test_what_matches_is_green_and_what_does_not_is_yellow():
    own = rich.get_console()
    kept = dict(own.__dict__)
    written = io.StringIO()
    rich.reconfigure(width=80, file=written, force_terminal=True, color_system="standard")
    try:
        rich.print(compare_spectra({"match": 1.0, "differ": 1.0}, {"match": 1.0, "differ": 2.0}))
    finally:
        own.__dict__ = kept
    assert "\x1b[32mmatch" in written.getvalue()
    assert "\x1b[33mdiffer" in written.getvalue()
