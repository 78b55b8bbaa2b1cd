"""The probe on several ranks: what they decide they decide alike."""

from __future__ import annotations

import pytest
import rank_probes
from processes import on_ranks


@pytest.mark.parametrize("how", ["by block", "tensor parallel"])
def test_a_step_of_a_sharded_model_is_measured(how: str):
    for found in on_ranks(rank_probes.measured, 2, how):
        assert found["tangent"] < 1e-12
        assert found["of a part"] < 1e-12
        assert found["state"]["checked"]
        assert found["state"]["method"] == found["method"]
        assert found["notes"] == []


def test_parameters_that_are_whole_in_their_places_are_known_by_their_names():
    assert all(distance < 1e-12 for distance in on_ranks(rank_probes.held_whole, 2))


def test_a_model_that_is_another_when_called_whole_is_found_out_and_measured_as_it_is():
    for method, distance, notes in on_ranks(rank_probes.wrong_when_whole, 2):
        assert method == "sharded_difference"
        assert distance < 1e-5
        assert len(notes) == 1
        assert "off by 50% from a finite difference through the model as it lies over the ranks" in notes[0]


def test_where_one_rank_runs_out_of_memory_none_measures():
    reasons = ["it could not be on another rank, whose notes say why.", "out of memory."]
    for (nothing, notes, distance), reason in zip(
        on_ranks(rank_probes.out_of_memory, 2, timeout=40), reasons, strict=True
    ):
        assert nothing
        assert notes == [f"The ghost radius was not measured at some steps: {reason}"]
        assert distance < 1e-12


def test_a_disagreement_is_that_of_all_ranks():
    (alone, together), (other, same) = on_ranks(rank_probes.only_one_disagrees, 2)
    assert (alone, other) == (0, pytest.approx(0.5))
    assert together == same == pytest.approx((1 / 5) ** 0.5)
