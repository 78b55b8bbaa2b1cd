"""Spectra of DTensors on real ranks, against a decomposition of the whole matrices in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from processes import on_ranks
from rank_spectra import (
    CASES,
    SCALES,
    Told,
    block,
    cuts,
    decided,
    divides,
    limits,
    measures,
    measures_parallelized,
    meets_what_is_not_finite,
    resumes,
    saves,
    whole_matrices,
)

from redline.update_limits import TOLERANCE as MARGIN

ACCURACY = 1e-4  # relative error of sigma_1 that Redline promises


def true_sigmas(matrices: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(torch.linalg.svdvals(matrix)[0]) for name, matrix in matrices.items()}


def the_same(told: list[Any]) -> Any:
    """What all ranks say, to the last bit."""
    for other in told[1:]:
        assert other == told[0]
    return told[0]


SOME = ("whole_stack", "rows_of_wide", "columns", "terms", "blocks", "convolution_taps", "transposed_grid", "experts")


@pytest.mark.parametrize(("size", "names"), [(2, SOME), (4, tuple(CASES))])
def test_every_placement(size: int, names: tuple[str, ...]) -> None:
    answers = on_ranks(measures, size, names)
    cold, warm, norms = the_same(answers)
    matrices = whole_matrices(names)
    expected = true_sigmas(matrices)
    assert list(cold.sigma) == list(matrices)
    for name, sigma in expected.items():
        assert cold.sigma[name] == pytest.approx(sigma, rel=ACCURACY), name
        assert warm.sigma[name] == pytest.approx(2 * sigma, rel=ACCURACY), name
        assert warm.passes[name] <= cold.passes[name]
        assert cold.residual[name] < 5e-3, name
    assert sum(warm.passes.values()) < sum(cold.passes.values()) / 2
    assert norms == pytest.approx([float(matrix.norm()) for matrix in matrices.values()], rel=1e-5)


def test_no_message_carries_a_matrix() -> None:
    """And there are as many of them as the docstring of sharded_spectra says, and three more."""
    names = ["rows", "columns", "rows_of_wide", "few_columns", "convolution_taps", "hybrid", "whole", "experts"]
    cold, warm, _ = the_same(on_ranks(measures, 4, names))
    sides = {
        "rows": 150, "columns": 200, "rows_of_wide": 300, "few_columns": 3, "convolution_taps": 150, "hybrid": 150
    }  # fmt: skip
    for told, agreed in ((cold, 1), (warm, 0)):
        rounds = {name: told.passes[f"{name}.weight"] // 2 for name in sides}
        messages = 2 * max(rounds.values()) - 1 + 1 + agreed  # and what each has measured on its own
        assert len(told.sent) == messages
        assert {kind for kind, _ in told.sent} == ({"allreduce_", "allgather_"} if agreed else {"allreduce_"})
        numbers = sum(
            side * min(6 * rounds[name], side) + 4 * (rounds[name] - 1) for name, side in sides.items() if side > 128
        )
        numbers += 3 * 4 // 2 + 4 + 3 * 4  # the small one, and the whole one with the three experts
        carried = sum(count for _, count in told.sent) - (2 * 5 if agreed else 0)
        assert carried == numbers
        assert max(count for _, count in told.sent) <= 6 * sum(sides.values())


@pytest.mark.parametrize(
    ("how", "size", "up"),
    [
        ("fsdp", 2, "(Shard(dim=0),)"),
        ("hybrid", 4, "(Replicate(), Shard(dim=0))"),
        ("tp", 2, "(Shard(dim=0),)"),
        ("fsdp over tp", 4, "(_StridedShard(dim=0, sf=2), Shard(dim=0))"),
    ],
)
def test_models_as_torch_divides_them(how: str, size: int, up: str) -> None:
    told, placements = the_same(on_ranks(measures_parallelized, size, how))
    assert placements["up.weight"] == up
    weights = {name: p.detach().double() for name, p in block().named_parameters() if p.dim() == 2}
    assert told.sigma == pytest.approx(true_sigmas(weights), rel=ACCURACY)


def test_whole_matrices_are_divided_and_each_keeps_its_owner() -> None:
    answers = on_ranks(divides, 2)
    owners: dict[tuple[int, ...], int] = {}
    for call, count in enumerate([5, 8, 8, 1, 0]):
        measured = [answers[rank][call] for rank in (0, 1)]
        assert sum(map(len, measured)) == count, "each once"
        for rank, shapes in enumerate(measured):
            for shape in shapes:
                assert owners.setdefault(shape, rank) == rank
    work = [sum(rows * columns for (rows, columns), owner in owners.items() if owner == rank) for rank in (0, 1)]
    assert max(work) < 1.25 * min(work)


def test_nan_arrives_as_nan_and_goes_again() -> None:
    during, after = the_same_but_for_nan(on_ranks(meets_what_is_not_finite, 4))
    expected = true_sigmas(whole_matrices(["whole", "whole_and_small", "rows", "columns", "blocks", "experts"]))
    assert after == pytest.approx(list(expected.values()), rel=ACCURACY)
    broken = {"whole.weight", "rows.weight", "blocks.weight", "experts.weight[1]"}
    for name, sigma in zip(expected, during, strict=True):
        assert math.isnan(sigma) == (name in broken), name
        assert name in broken or sigma == pytest.approx(expected[name], rel=ACCURACY)


def the_same_but_for_nan(told: list[Any]) -> Any:
    assert len({repr(one) for one in told}) == 1
    return told[0]


@pytest.fixture(scope="module")
def saved() -> list[bytes]:
    return on_ranks(saves, 2)


@pytest.fixture(scope="module")
def cold() -> Told:
    return the_same(on_ranks(resumes, 2, [None, None]))


class TestResuming:
    """Each from the states that the two ranks of a run have saved."""

    SPLIT = ("rows.weight", "columns.weight", "blocks.weight", "convolution_out.weight")

    def resumed(self, states: list[bytes | None]) -> Told:
        names = ["whole", "whole_and_small", "replicated", "rows", "columns", "blocks", "experts", "convolution_out"]
        told = the_same(on_ranks(resumes, len(states), states))
        assert told.sigma == pytest.approx(true_sigmas(whole_matrices(names)), rel=ACCURACY)
        return told

    def test_each_rank_from_its_own_all_is_warm(self, saved: list[bytes], cold: Told) -> None:
        told = self.resumed([*saved])
        for name in (*self.SPLIT, "whole.weight", "replicated.weight", "experts.weight[0]", "experts.weight[2]"):
            assert told.passes[name] < cold.passes[name], name

    def test_all_from_that_of_the_first_what_that_has_is_warm(self, saved: list[bytes], cold: Told) -> None:
        told = self.resumed([saved[0], saved[0]])
        for name in (*self.SPLIT, "experts.weight[0]", "experts.weight[1]"):
            assert told.passes[name] < cold.passes[name], name
        assert told.passes["experts.weight[2]"] >= cold.passes["experts.weight[2]"] - 4, "the second rank's"

    def test_more_ranks_what_lay_in_parts_is_warm(self, saved: list[bytes], cold: Told) -> None:
        told = self.resumed([saved[0]] * 4)
        for name in set(self.SPLIT) - {"blocks.weight"}:  # which lay in columns alone
            assert told.passes[name] < cold.passes[name], name

    def test_where_some_load_nothing_what_lies_in_parts_starts_cold(self, saved: list[bytes], cold: Told) -> None:
        told = self.resumed([saved[0], None])
        for name in self.SPLIT:
            assert told.passes[name] >= cold.passes[name] - 4, name

    def test_one_device_goes_on_with_what_fits(self, saved: list[bytes]) -> None:
        self.resumed([saved[0]])


@pytest.mark.parametrize("size", [2, 4])
def test_numbers_a_matrix_are_cut_to_the_part_here(size: int) -> None:
    for answer in on_ranks(cuts, size):
        assert [name for name, right in answer if not right] == []
        assert len(answer) == 11


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("relative_to", ["weight", "fan"])
def test_updates_are_held_to_their_limits_wherever_they_lie(relative_to: str, size: int) -> None:
    factors, sent = the_same(on_ranks(limits, size, relative_to))
    names = ["whole", "rows", "columns", "blocks", "convolution_out", "experts", "experts_rows", "positions"]
    matrices = whole_matrices(names)
    for k, (name, matrix) in enumerate(matrices.items()):
        scale, sigma = SCALES[k % len(SCALES)], float(torch.linalg.svdvals(matrix)[0])
        rows, columns = matrix.shape
        limit = sigma if relative_to == "weight" else 8 * 0.5 * (rows / columns) ** 0.5
        over = scale * sigma * (1 + MARGIN) / limit
        assert factors.get(name, 1.0) == pytest.approx(min(1.0, 1 / over), rel=2e-4), name
        surely_under = {
            "weight": scale * min(rows, columns) ** 0.5 * (1 + MARGIN) <= 1,
            "fan": scale * float(matrix.norm()) * (1 + MARGIN) <= limit,
        }[relative_to]
        assert (name in factors) != surely_under, name
    assert len(factors) < len(matrices)
    if size == 1:
        assert sent == []


@pytest.mark.parametrize("size", [1, 4])
def test_decisions_on_matrices_are_carried_out_on_parts(size: int) -> None:
    for answer in on_ranks(decided, size):
        assert [what for what, right in answer.items() if not right] == []
