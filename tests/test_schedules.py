"""Schedules: their values at given times, and that they hold no state."""

import pytest

from mvae.schedules import Schedule, constant, cosine, held, late, linear, warmed_up

TIMES = [0.0, 0.25, 1.0, 2.0, 3.0, 4.0, 5.0]


def values(schedule: Schedule) -> list[float]:
    return [schedule(t) for t in TIMES]


def test_constant_is_one_unless_told() -> None:
    assert values(constant()) == [1.0] * 7
    assert values(constant(0.3)) == [0.3] * 7


def test_linear_reaches_1_at_the_end_of_its_epochs_and_stays() -> None:
    assert values(linear(4)) == [0, 0.0625, 0.25, 0.5, 0.75, 1, 1]


def test_linear_over_no_epochs_is_1_from_the_start() -> None:
    assert values(linear(0)) == [1.0] * 7


def test_cosine_falls_from_1_to_0_and_stays() -> None:
    assert values(cosine(4)) == pytest.approx([1, 0.990393, 0.853553, 0.5, 0.146447, 0, 0], abs=1e-6)


def test_late_is_1_for_the_first_half_and_0_at_the_end() -> None:
    assert values(late(4)) == [1, 1, 1, 1, 0.5, 0, 0]


def test_warmed_up_rises_to_the_schedule_and_is_it_from_then_on() -> None:
    assert values(warmed_up(0.5, late(4))) == [0, 0.5, 1, 1, 0.5, 0, 0]


def test_warmed_up_over_no_epochs_is_the_schedule() -> None:
    assert values(warmed_up(0, cosine(4))) == values(cosine(4))


@pytest.mark.parametrize("schedule", [linear(4), cosine(4), late(4), warmed_up(2, late(4))])
def test_schedules_are_functions_of_the_time_alone(schedule: Schedule) -> None:
    assert [schedule(t) for t in reversed(TIMES)] == values(schedule)[::-1]


def test_held_is_0_and_then_the_schedule_from_its_beginning() -> None:
    assert values(held(2, linear(2))) == [0, 0, 0, 0, 0.5, 1, 1]


def test_held_for_no_epochs_is_the_schedule() -> None:
    assert values(held(0, linear(4))) == values(linear(4))
