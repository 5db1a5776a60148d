"""Schedules: their values at given times."""

from mvae.run.schedules import Schedule, cosine, held, late, linear, named, warmed_up

import pytest

TIMES = [0.0, 0.25, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (linear(4), [0, 0.0625, 0.25, 0.5, 0.75, 1, 1]),
        (linear(0), [1, 1, 1, 1, 1, 1, 1]),
        (cosine(4), [1, 0.990393, 0.853553, 0.5, 0.146447, 0, 0]),
        (late(4), [1, 1, 1, 1, 0.5, 0, 0]),
        (warmed_up(0.5, late(4)), [0, 0.5, 1, 1, 0.5, 0, 0]),
        (warmed_up(0, late(4)), [1, 1, 1, 1, 0.5, 0, 0]),
        (held(2, linear(2)), [0, 0, 0, 0, 0.5, 1, 1]),
        (held(0, linear(4)), [0, 0.0625, 0.25, 0.5, 0.75, 1, 1]),
        (named("constant", 4), [1, 1, 1, 1, 1, 1, 1]),
        (named("cosine", 4), [1, 0.990393, 0.853553, 0.5, 0.146447, 0, 0]),
        (named("late", 4), [1, 1, 1, 1, 0.5, 0, 0]),
    ],
)
def test_schedules_are_functions_of_the_epochs_done(schedule: Schedule, values: list[float]) -> None:
    assert [schedule(t) for t in TIMES] == pytest.approx(values, abs=1e-6)
