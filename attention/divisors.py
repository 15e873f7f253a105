"""Divisors, for heads and batches that must come out even."""

import math


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of number that is at most `at_most` (>= 1)."""
    return max(d for d in divisors(number) if d <= at_most)


def nearest_divisors(number: int, value: int) -> list[int]:
    """The divisors of number just below and just above value."""
    found = divisors(number)
    return [d for d in found if d < value][-1:] + [d for d in found if d > value][:1]
