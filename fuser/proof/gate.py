"""Which of many rewrites to leave out, or which was the first bad one, with few runs of a check."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from fuser.errors import VerificationError

T = TypeVar("T", bound=Hashable)


def find_guilty(rewrites: Sequence[T], passes_without: Callable[[frozenset[T]], bool]) -> tuple[T, ...]:
    """The rewrites to leave out, in their order: without them the check passes, without fewer of them it fails.

    Bisection after Junker, "QuickXplain" (AAAI 2004): about 2 log2(n) checks for one guilty rewrite among n, and
    k log2(n / k) times a small factor for k of them, whether each is wrong by itself or only two together are (then
    one of the two is found).  That holds where leaving out more never makes a passing result fail; where it does,
    the answer is found by Zeller's delta debugging, which needs more checks.  No set is checked twice.

    passes_without: whether the check passes with these left out; `rewrites` as a whole is known to fail.
    Raises `VerificationError` when the check fails even without all of them.
    """
    verdicts: dict[frozenset[T], bool] = {frozenset(): False}

    def passes(left_out: Sequence[T]) -> bool:
        key = frozenset(left_out)
        if key not in verdicts:
            verdicts[key] = passes_without(key)
        return verdicts[key]

    def explain(known: list[T], grew: bool, candidates: list[T]) -> list[T]:
        """What of `candidates` must be left out besides `known`."""
        if grew and passes(known):
            return []
        if len(candidates) == 1:
            return candidates
        middle = len(candidates) // 2
        early, late = candidates[:middle], candidates[middle:]
        from_late = explain(known + early, True, late)
        from_early = explain(known + from_late, bool(from_late), early)
        return from_early + from_late

    every = list(dict.fromkeys(rewrites))
    if not every:
        raise VerificationError("the check fails, and no rewrite was applied that could be left out")
    guilty = explain([], False, every)
    if not passes(guilty):
        if not passes(every):
            raise VerificationError("the check fails even with every rewrite left out")
        guilty = _reduce(every, passes)
    found = set(guilty)
    return tuple(rewrite for rewrite in every if rewrite in found)


def first_bad(total: int, passes_after: Callable[[int], bool]) -> int | None:
    """The number of the first rewrite, from 1, after which the check fails; None when it passes after all `total`.

    passes_after: whether the check passes when only the first n rewrites are applied.  It is asked about
    log2(total) times, and taken to fail ever after it first fails; where it recovers in between, the answer is one
    rewrite that turns passing into failing.
    """
    if passes_after(total):
        return None
    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if passes_after(middle) else (good, middle)
    return bad


def _reduce(start: list[T], passes: Callable[[Sequence[T]], bool]) -> list[T]:
    """A subset that passes and from which no single element can be taken; `start` passes (ddmin, Zeller 2002)."""
    current, parts = start, 2
    while len(current) > 1:
        size = -(-len(current) // parts)
        chunks = [current[i : i + size] for i in range(0, len(current), size)]
        rests = [[x for x in current if x not in set(chunk)] for chunk in chunks]
        smaller = next((subset for subset in [*chunks, *rests] if subset and passes(subset)), None)
        if smaller is not None:
            parts = 2 if smaller in chunks else max(parts - 1, 2)
            current = smaller
        elif parts >= len(current):
            break
        else:
            parts = min(2 * parts, len(current))
    return current
