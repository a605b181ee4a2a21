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


def advance(scheduler, step):
    for group in step.prefill:
        group.prefix = "run"
    for sequence in step.sequences:
        sequence.completion.tokens.append(0)


def test_prompts_enter_up_to_the_token_budget_and_a_too_long_one_enters_only_alone():
    scheduler = Scheduler(requests(3, 3, 9, 2), num_slots=4, prefill_budget=7)
    sizes = []
    while not scheduler.done:
        step = scheduler.schedule()
        advance(scheduler, step)
        sizes.append([len(group.tokens) for group in step.prefill])
        scheduler.leave([True] * len(step.sequences))
    assert sizes == [[3, 3], [9], [2]]


def test_a_group_that_does_not_fit_enters_later_on_its_kept_prefix():
    scheduler = Scheduler(requests(4, copies=5), num_slots=2, prefill_budget=100)
    prefills, entered = 0, []
    while not scheduler.done:
        step = scheduler.schedule()
        advance(scheduler, step)
        prefills += len(step.prefill)
        entered += [sequence.completion.index for _, group in step.entering for sequence in group]
        scheduler.leave([True] * len(step.sequences))
    assert prefills == 1
    assert entered == [0, 1, 2, 3, 4]


def test_slots_stay_gapless_and_moves_follow_the_sequences():
    chooser = random.Random(0)
    scheduler = Scheduler(requests(*[1 + i % 5 for i in range(40)], copies=2), num_slots=7, prefill_budget=9)
    slots = {}
    while not scheduler.done:
        step = scheduler.schedule()
        advance(scheduler, step)
        for slot, sequence in enumerate(step.sequences):
            assert slots.setdefault(slot, sequence) is sequence
        finished = [chooser.random() < 0.4 for _ in step.sequences]
        moves = scheduler.leave(finished)
        for source, target, length in moves:
            slots[target] = slots.pop(source)
            assert length == slots[target].num_cached
        slots = {slot: slots[slot] for slot in range(len(scheduler.live))}
        assert list(slots.values()) == scheduler.live
    assert sorted(scheduler.finished) == list(range(80))


def test_a_prompt_over_the_budget_enters_beside_live_sequences_and_no_other_prompt_does():
    scheduler = Scheduler(requests(3, 9, 9, 2, 2), num_slots=8, prefill_budget=7)
    sizes, live = [], []
    for _ in range(4):
        step = scheduler.schedule()
        advance(scheduler, step)
        sizes.append([len(group.tokens) for group in step.prefill])
        live.append(len(step.live))
        scheduler.leave([False] * len(step.sequences))
    assert sizes == [[3], [9], [9], [2, 2]]
    assert live == [0, 1, 2, 3]
