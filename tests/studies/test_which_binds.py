"""Which radius binds: the study's figures, the step it takes, and verdicts that follow the figures."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from redline.integrations.demo.data import digits

EVIDENCE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "which_binds.json"


def made_up(*bound: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Results in which one radius binds at all 10 steps of each ``(optimizer, phase, radius)``."""
    sizes = {"output": [1.0, 0.1, 0.2, 0.1], "attention": [0.01, 1.0, 0.2, 0.1], "feed-forward": [0.1, 0.1, 1.0, 0.05]}
    return [
        {"optimizer": name, "phase": phase, "seed": 0, "steps": 10, "sizes": [sizes[radius]] * 10}
        for name, phase, radius in bound
    ]


def verdicts(study: ModuleType, *bound: tuple[str, str, str]) -> list[str]:
    return [claim.verdict for claim in study.claims(made_up(*bound))]


def test_the_shares_in_the_table_are_those_of_the_steps(page: dict[str, Any]):
    assert len(page["table"]["rows"]) == 4
    for row in page["table"]["rows"]:
        optimizer, phase = row[0].split(", ")
        (result,) = [one for one in page["results"] if (one["optimizer"], one["phase"]) == (optimizer, phase)]
        assert all(max(sizes[:3]) == 1 for sizes in result["sizes"]), "each step has the length of the shortest radius"
        steps = len(result["sizes"])
        for place in range(3):
            count = sum(sizes[place] == 1 for sizes in result["sizes"])
            assert float(row[2 + place].rstrip("%")) == pytest.approx(100 * count / steps, abs=0.05)


def test_every_claim_names_both_figures(page: dict[str, Any]):
    assert len(page["claims"]) == 4
    for claim in page["claims"]:
        assert "table 2" in claim["published"]
        assert "(gradient)" in claim["measured"]
        assert "(Adam)" in claim["measured"]
        assert claim["verdict"] in ("holds", "holds in part", "does not hold here")


def test_the_feed_forward_binds_early_and_attention_never_even_in_the_short_form(page: dict[str, Any]):
    by_claim = {claim["claim"]: claim["verdict"] for claim in page["claims"]}
    assert by_claim["Early the feed-forward binds."] == "holds"
    assert by_claim["Attention never binds."] == "holds"


def test_verdicts_follow_the_figures(study: ModuleType):
    early = [("gradient", "early", "feed-forward"), ("Adam", "early", "feed-forward")]
    as_published = verdicts(study, *early, ("gradient", "late", "output"), ("Adam", "late", "output"))
    assert as_published == ["holds"] * 4
    one_of_two = verdicts(study, *early, ("gradient", "late", "output"), ("Adam", "late", "feed-forward"))
    assert one_of_two == ["holds", "holds in part", "holds in part", "holds"]
    attention = verdicts(study, *early, ("gradient", "late", "attention"), ("Adam", "late", "feed-forward"))
    assert attention == ["holds", "does not hold here", "does not hold here", "does not hold here"]


def test_a_step_has_the_length_of_the_shortest_radius(study: ModuleType):
    """The radii of the step as made, by float64 differences."""
    torch.manual_seed(0)
    x, y, _, _ = digits()
    model = study.transformer()
    before = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    _, lengths = study.shortest_radius_step(model, optimizer, x[:64], y[:64])
    update = {name: (p.double() - q).detach() for (name, p), q in zip(model.named_parameters(), before.parameters())}  # noqa: B905

    def at(t: float) -> list[torch.Tensor]:
        moved = copy.deepcopy(before).double()
        seen: list[torch.Tensor] = []
        for module in moved.modules():
            if isinstance(module, nn.Linear) and module.out_features == 128:
                module.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        values = {name: p.detach() + t * update[name] for name, p in moved.named_parameters()}
        return [functional_call(moved, values, (x[:64].double(),)).detach(), *seen]

    h = 1e-6
    (_, *inputs), ahead, behind = at(0.0), at(h), at(-h)
    slopes = [(one - other) / (2 * h) for one, other in zip(ahead, behind, strict=True)]
    output = (slopes[0].amax(-1) - slopes[0].amin(-1)).max().item() / math.pi
    feed_forward = []
    for value, slope in zip(inputs, slopes[1:], strict=True):
        radii = sorted((value.abs() / slope.abs()).flatten().tolist())
        feed_forward.append(1 / radii[math.ceil(0.01 * len(radii)) - 1])
    made = max(lengths[:3])
    assert output == pytest.approx(lengths[0] / made, rel=1e-2)
    assert max(feed_forward) == pytest.approx(lengths[2] / made, rel=1e-2)


def test_the_committed_page_is_what_the_study_says_of_its_results(study: ModuleType):
    kept = json.loads(EVIDENCE.read_text())
    assert kept["command"] == "python examples/studies/which_binds.py --out docs/evidence"
    assert [(claim.measured, claim.verdict) for claim in study.claims(kept["results"])] == [
        (claim["measured"], claim["verdict"]) for claim in kept["claims"]
    ]
