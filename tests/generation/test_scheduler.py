"""The scheduler's bookkeeping, without a model."""

import random

from meshift.generation.params import Request
from meshift.generation.scheduler import Scheduler


def requests(*lengths, copies=1):
    return [
        Request(tokens=[prompt] * length, index=prompt * copies + copy)
        for prompt, length in enumerate(lengths)
        for copy in range(copies)
    ]


def advance(step):
    """What the engine does with a step; returns the lengths of the prompts it ran."""
    run = [len(entry.group.tokens) for entry in step.prefill]
    for entry in step.prefill:
        entry.group.prefix = "run" if entry.group.waiting else None
    return run


def everyone(scheduler):
    return list(range(scheduler.num_live))


def test_prompts_enter_up_to_the_token_budget_and_a_too_long_one_enters_only_alone():
    scheduler = Scheduler(requests(3, 3, 9, 2), num_slots=4, prefill_budget=7)
    sizes = []
    while not scheduler.done:
        sizes.append(advance(scheduler.schedule()))
        scheduler.leave(everyone(scheduler))
    assert sizes == [[3, 3], [9], [2]]


def test_a_group_that_does_not_fit_enters_later_on_its_kept_prefix():
    scheduler = Scheduler(requests(4, copies=5), num_slots=2, prefill_budget=100)
    prefills, entered = 0, []
    while not scheduler.done:
        step = scheduler.schedule()
        prefills += len(advance(step))
        entered += [request.index for entry in step.entering for request in entry.requests]
        scheduler.leave(everyone(scheduler))
    assert prefills == 1
    assert entered == [0, 1, 2, 3, 4]


def test_slots_stay_gapless_and_moves_follow_the_sequences():
    chooser = random.Random(0)
    scheduler = Scheduler(requests(*[1 + i % 5 for i in range(40)], copies=2), num_slots=7, prefill_budget=9)
    slots, finished = {}, []
    while not scheduler.done:
        step = scheduler.schedule()
        advance(step)
        assert sorted(slots) == list(range(step.num_live))
        for entry in step.entering:
            for slot, request in enumerate(entry.requests, start=entry.slot):
                assert slot not in slots
                slots[slot] = request.index
            assert slot + 1 == entry.stop
        ended = [slot for slot in sorted(slots) if chooser.random() < 0.4]
        finished += [slots.pop(slot) for slot in ended]
        for source, target in scheduler.leave(ended):
            assert target not in slots, "a sequence would be overwritten"
            slots[target] = slots.pop(source)
        assert sorted(slots) == list(range(scheduler.num_live))
    assert sorted(finished) == list(range(80))


def test_a_prompt_over_the_budget_enters_beside_live_sequences_and_no_other_prompt_does():
    scheduler = Scheduler(requests(3, 9, 9, 2, 2), num_slots=8, prefill_budget=7)
    sizes, live = [], []
    for _ in range(4):
        step = scheduler.schedule()
        sizes.append(advance(step))
        live.append(step.num_live)
    assert sizes == [[3], [9], [9], [2, 2]]
    assert live == [0, 1, 2, 3]


def test_prompts_wait_until_several_slots_are_free_and_never_when_nothing_lives():
    scheduler = Scheduler(requests(*[1] * 40), num_slots=16, prefill_budget=100)
    assert len(scheduler.schedule().entering) == 16
    scheduler.leave([3])
    assert not scheduler.schedule().entering, "one free slot of sixteen: a pass for one prompt would not pay"
    scheduler.leave([5])
    assert len(scheduler.schedule().entering) == 2
    scheduler.leave(everyone(scheduler))
    assert len(scheduler.schedule().entering) == 16
    scheduler.leave(everyone(scheduler))
    assert len(scheduler.schedule().entering) == 6
    last = Scheduler(requests(*[1] * 17), num_slots=16, prefill_budget=100)
    last.schedule()
    last.leave([0])
    assert len(last.schedule().entering) == 1, "the last one waits for nobody"
