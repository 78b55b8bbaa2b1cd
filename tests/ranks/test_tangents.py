"""Logit tangents of models that lie over several ranks: those of the plain models they were made of."""

from __future__ import annotations

import pytest
import rank_tangents
import torch
from processes import on_ranks

# In half precision the plain model is compared with, and the replay is, in full precision: on the CPU that is free.
WHOLE = [
    ("by block", 2),
    ("at once", 4),
    ("kept whole", 2),
    ("copied and split", 4),
    ("in half precision", 2),
    ("compiled and recomputed", 2),
    ("pictures", 4),
    ("tensor parallel", 2),
    ("split and tensor parallel", 4),
]


@pytest.mark.parametrize(("how", "size"), WHOLE)
def test_it_is_that_of_the_plain_model(how: str, size: int):
    for found in on_ranks(rank_tangents.taken, size, how, "auto"):
        assert found["method"] in ("forward_mode", "math_attention")
        assert found["logits"] < 1e-12
        assert found["tangent"] < 1e-12
        assert found["untouched"]


@pytest.mark.parametrize(("how", "size"), [("by block", 4), ("pictures", 2), ("split and tensor parallel", 4)])
def test_by_finite_difference(how: str, size: int):
    for found in on_ranks(rank_tangents.taken, size, how, "finite_difference"):
        assert found["tangent"] < 1e-5
        assert found["untouched"]


def test_in_float32_it_is_good_to_float32():
    for found in on_ranks(rank_tangents.taken, 2, "by block", "auto", torch.float32):
        assert found["logits"] < 1e-5
        assert found["tangent"] < 1e-5


@pytest.mark.parametrize("how", ["by block", "kept whole", "pictures", "tensor parallel"])
def test_through_the_sharded_model_itself(how: str):
    for found in on_ranks(rank_tangents.taken, 2, how, "sharded_difference"):
        assert found["method"] == "sharded_difference"
        assert found["tangent"] < 1e-5
        assert found["untouched"]


def test_a_model_that_counts_on_its_shards_is_measured_through_them():
    for found in on_ranks(rank_tangents.taken, 2, "local heads", "auto"):
        assert found["method"] == "sharded_difference"
        assert found["tangent"] < 1e-5
        assert found["untouched"]


def test_in_half_precision_a_difference_through_the_model_is_refused():
    for said in on_ranks(rank_tangents.refused, 2):
        assert "would measure rounding: it computes in torch.bfloat16" in said


@pytest.mark.parametrize("method", ["auto", "sharded_difference"])
@pytest.mark.parametrize("how", ["by block", "kept whole", "pictures"])
def test_training_goes_on_as_if_nothing_had_been_measured(how: str, method: str):
    for same, moved in on_ranks(rank_tangents.trained, 2, how, method):
        assert same
        assert moved > 0


@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_no_more_is_whole_at_a_time_than_the_models_own_and_one_block(method: str):
    for most, after, units in on_ranks(rank_tangents.most_at_a_time, 2, "by block", method):
        root = 2 * units["root"] - units["codes"]  # values and direction; no optimizer holds the codes
        assert 2 * units["block"] <= most <= root + 2 * units["block"]
        assert method != "auto" or most == root + 2 * units["block"]
        assert after == 0


@pytest.mark.parametrize(("method", "passes"), [("forward_mode", 1), ("finite_difference", 2)])
def test_a_pass_takes_one_message_a_unit_and_twice_the_parameters_bytes(method: str, passes: int):
    for sizes, of_parameters in on_ranks(rank_tangents.messages, 2, method):
        assert len(sizes) == 4 * passes  # the model's own, and three blocks
        assert sum(sizes) == pytest.approx(2 * of_parameters * passes, rel=0.05)  # uneven parts are filled up


@pytest.mark.parametrize("how", ["by block", "at once", "tensor parallel"])
def test_layers_go_by_the_names_and_figures_of_the_plain_model(how: str):
    for found, expected in on_ranks(rank_tangents.layers, 2, how):
        assert found.keys() == expected.keys()
        assert len(expected) >= 2
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("how", "size"), [("by block", 4), ("copied and split", 4), ("tensor parallel", 2)])
def test_the_size_of_a_step_is_that_of_all_parts(how: str, size: int):
    answers = on_ranks(rank_tangents.stretches, size, how)
    assert len({found for found, _ in answers}) == 1
    assert answers[0][0] == pytest.approx(answers[0][1], rel=1e-12)


class TestFailures:
    @pytest.mark.parametrize("kind", ["raise", "memory"])
    @pytest.mark.parametrize("who", [None, 0, 1])
    def test_what_fails_on_one_rank_fails_on_all_and_leaves_everything_in_place(self, kind: str, who: int | None):
        answers = on_ranks(rank_tangents.failing, 2, "by block", kind, who, "auto", timeout=30)
        own = {"raise": "Tripped", "memory": "OutOfMemoryError"}[kind]
        for rank, answer in enumerate(answers):
            assert answer["raised"] == (own if who in (None, rank) else "ElsewhereError")
            assert answer["kept"]
            assert answer["again"] < 1e-12

    def test_a_forward_that_raises_leaves_a_model_that_was_moved_in_place_as_it_was(self):
        for answer in on_ranks(rank_tangents.failing, 2, "by block", "raise", None, "sharded_difference"):
            assert answer["raised"] == "Tripped"
            assert answer["kept"]
            assert answer["again"] < 1e-12


def test_the_users_own_hooks_run_and_stay_in_their_order():
    for runs, before, after in on_ranks(rank_tangents.with_hooks_of_the_users, 2):
        assert runs == ["pre", "post"]
        assert before == after
