"""Schedules: functions of t, the epochs done, for β and for a factor of the learning rate.

They have no state, so a resumed run gets the same values. Any function will do: `lambda t: 0.95**t`.
"""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]
"""A function of t, the epochs done when the step ends: t is 1.0 at the last step of the first epoch."""


def linear(epochs: float) -> Schedule:
    """Rise from 0 to 1 over the first `epochs`, then stay; 1 from the start if `epochs` is 0.

    The paper's β is linear(200) for its 500 epochs of MNIST.
    """
    return lambda t: min(1.0, t / epochs) if epochs else 1.0


def held(epochs: float, schedule: Schedule) -> Schedule:
    """Return 0 over the first `epochs`, then `schedule` from its start. As β: first learn to reconstruct."""
    return lambda t: 0.0 if t < epochs else schedule(t - epochs)


def cosine(epochs: float) -> Schedule:
    """Fall from 1 to 0 over `epochs`, along half a period of the cosine (Loshchilov & Hutter 2017, equation 5)."""
    return lambda t: 0.5 * (1 + math.cos(math.pi * min(1.0, t / epochs)))


def warmed_up(epochs: float, schedule: Schedule) -> Schedule:
    """Multiply `schedule` by a factor that rises from 0 to 1 over the first `epochs`."""
    rise = linear(epochs)
    return lambda t: rise(t) * schedule(t)


def late(epochs: float) -> Schedule:
    """Return 1 for the first half of `epochs`, then fall linearly to 0 at their end."""
    return lambda t: min(1.0, max(0.0, 2 - 2 * t / epochs))


def named(name: str, epochs: float) -> Schedule:
    """Return "constant", or "cosine" or "late" over `epochs`."""
    return {"constant": lambda t: 1.0, "cosine": cosine(epochs), "late": late(epochs)}[name]
