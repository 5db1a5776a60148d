"""Schedules: functions of t, the epochs done (a float), for β and for the learning rate's factor.

They hold no state, so a resumed run meets the same values. A schedule of your own is any such function:
`lambda t: 0.95**t`.
"""

import math
from collections.abc import Callable

from .errors import UsageError

Schedule = Callable[[float], float]
"""A function of t, the epochs done when the step ends: t is 1.0 at the last step of the first epoch."""


def constant(value: float = 1.0) -> Schedule:
    """Always `value`."""
    return lambda t: value


def linear(epochs: float) -> Schedule:
    """Rises from 0 to 1 over the first `epochs`, then stays; 1 from the start if `epochs` is 0.

    The paper's β: linear(200) for its 500 epochs of MNIST.
    """
    _check(epochs >= 0, epochs, "0 or more")
    return lambda t: min(1.0, t / epochs) if epochs else 1.0


def held(epochs: float, schedule: Schedule) -> Schedule:
    """0 over the first `epochs`, then `schedule` as if it began there.

    For β: the networks first learn to reconstruct.
    """
    _check(epochs >= 0, epochs, "0 or more")
    return lambda t: 0.0 if t < epochs else schedule(t - epochs)


def cosine(epochs: float) -> Schedule:
    """Falls from 1 to 0 over `epochs`, along half a period of the cosine (Loshchilov & Hutter 2017, equation 5)."""
    _check(epochs > 0, epochs, "above 0")
    return lambda t: 0.5 * (1 + math.cos(math.pi * min(1.0, t / epochs)))


def warmed_up(epochs: float, schedule: Schedule) -> Schedule:
    """`schedule`, multiplied by a factor that rises from 0 to 1 over the first `epochs`."""
    rise = linear(epochs)
    return lambda t: rise(t) * schedule(t)


def late(epochs: float) -> Schedule:
    """1 for the first half of `epochs`, then falls linearly to 0 at their end."""
    _check(epochs > 0, epochs, "above 0")
    return lambda t: min(1.0, max(0.0, 2 - 2 * t / epochs))


def _check(right: bool, epochs: float, wanted: str) -> None:
    if not right:
        raise UsageError(f"`epochs` of a schedule is {epochs}, and a number {wanted} is wanted")
