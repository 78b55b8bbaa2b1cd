"""Ranks that try the same thing, each played by what the others answer."""

from __future__ import annotations

import pytest

from redline.numerics.agreement import ElsewhereError, alone, go_on, in_step


class Others:
    """Answers each question with what the other ranks say, and keeps what was asked."""

    def __init__(self, *answers: bool):
        self.answers, self.asked = list(answers), []

    def __call__(self, flag: bool) -> bool:
        self.asked.append(flag)
        return flag and self.answers.pop(0)


def test_one_rank_agrees_with_itself():
    with in_step(alone):
        go_on(alone)
    assert not alone(False)


def test_all_meet_at_the_end():
    others = Others(True, True)
    with in_step(others):
        go_on(others)
    assert others.asked == [True, True]


@pytest.mark.parametrize("answers", [(False,), (True, False)])
def test_who_is_well_hears_of_a_failure_elsewhere_and_asks_no_more(answers: tuple[bool, ...]):
    others = Others(*answers)
    with pytest.raises(ElsewhereError, match="failed on another rank"), in_step(others):
        go_on(others)
    assert others.asked == [True] * len(answers)
    assert others.answers == []


def test_who_fails_says_so_once():
    others = Others()
    with pytest.raises(KeyError), in_step(others):
        raise KeyError("mine")
    assert others.asked == [False]
