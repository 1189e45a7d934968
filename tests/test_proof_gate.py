"""Finding the rewrites at fault with few checks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuser.errors import VerificationError
from fuser.proof.gate import find_guilty, first_bad


class Check:
    """Passes when no guilty set is wholly present; counts how often it is asked."""

    def __init__(self, total: int, *guilty: set[int]) -> None:
        self.rewrites, self.guilty, self.asked = list(range(total)), guilty, 0

    def __call__(self, left_out: frozenset[int]) -> bool:
        self.asked += 1
        return all(group & left_out for group in self.guilty)

    def minimal(self, answer: tuple[int, ...]) -> bool:
        whole = frozenset(answer)
        return self(whole) and not any(self(whole - {one}) for one in whole)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 1000])
def test_one_guilty_rewrite_is_found_in_about_two_log2_checks(total: int) -> None:
    for guilty in {0, total // 2, total - 1}:
        check = Check(total, {guilty})
        assert find_guilty(check.rewrites, check) == (guilty,)
        assert check.asked <= 2 * math.ceil(math.log2(total)) + 2


def test_several_guilty_rewrites_are_all_found_in_their_order() -> None:
    check = Check(200, {150}, {3}, {151}, {77})
    assert find_guilty(check.rewrites, check) == (3, 77, 150, 151)
    assert check.asked < 4 * 2 * 8


def test_of_two_that_are_wrong_only_together_one_is_left_out() -> None:
    check = Check(64, {10, 50})
    answer = find_guilty(check.rewrites, check)
    assert answer in {(10,), (50,)}


@given(st.integers(1, 40), st.data())
def test_the_answer_passes_and_nothing_can_be_taken_from_it(total: int, data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.sets(st.integers(0, total - 1), min_size=1, max_size=3), min_size=1, max_size=4))
    check = Check(total, *groups)
    answer = find_guilty(check.rewrites, check)
    assert check.minimal(answer)
    assert list(answer) == sorted(answer)


def test_no_set_is_checked_twice() -> None:
    seen: list[frozenset[int]] = []

    def passes_without(left_out: frozenset[int]) -> bool:
        assert left_out not in seen
        seen.append(left_out)
        return {2, 9} <= left_out

    assert find_guilty(range(12), passes_without) == (2, 9)


def test_where_leaving_out_more_can_break_a_passing_result() -> None:
    """Only a few combinations pass, so bisection alone may end at one that does not."""

    def passes_without(left_out: frozenset[int]) -> bool:
        applied = set(range(8)) - left_out
        return not applied or applied == {0, 1, 2, 4, 5, 6, 7} or applied <= {0, 1}

    answer = find_guilty(range(8), passes_without)
    assert passes_without(frozenset(answer))


def test_a_failure_that_no_rewrite_explains_is_an_error() -> None:
    with pytest.raises(VerificationError, match="even with every rewrite left out"):
        find_guilty("abc", lambda left_out: False)
    with pytest.raises(VerificationError, match="no rewrite was applied"):
        find_guilty([], lambda left_out: True)


@given(st.integers(1, 500), st.data())
def test_the_first_bad_rewrite(total: int, data: st.DataObject) -> None:
    guilty = data.draw(st.integers(1, total + 1))
    asked: list[int] = []

    def passes_after(number: int) -> bool:
        asked.append(number)
        return number < guilty

    assert first_bad(total, passes_after) == (guilty if guilty <= total else None)
    assert len(asked) <= math.ceil(math.log2(total)) + 1 and 0 not in asked
