"""What the soak draws can be lived, and can be drawn again."""

from tests.faults.soak import ENDS, MARKS, STEPS, draw


def test_a_schedule_is_a_function_of_its_seed_and_number() -> None:
    schedules = [draw(1, number) for number in range(200)]
    assert schedules == [draw(1, number) for number in range(200)]
    assert len({str(schedule) for schedule in schedules}) == 200
    assert draw(2, 0) != draw(1, 0)
    assert any(schedule.lives[0].is_elastic for schedule in schedules)
    for schedule in schedules:
        *before, last = schedule.lives
        assert all(life.deeds and life.deeds[-1].what in ENDS for life in before), "something ends it"
        assert all(deed.what not in ENDS for deed in last.deeds), "the last one completes"
        notes = [deed.note for life in schedule.lives for deed in life.deeds]
        assert set(notes) == {number for number, fault in enumerate(schedule.faults) if fault.kind in MARKS}
        steps = [schedule.faults[note].step for note in notes]
        assert steps == sorted(steps), "a life waits for one after the other"
        assert all(fault.step is None or 0 <= fault.step < STEPS for fault in schedule.faults)
        assert all(fault.follows is None or fault.follows < number for number, fault in enumerate(schedule.faults))
