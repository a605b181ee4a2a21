"""The course of a generation: against the engine's own scheduler with random lengths, and loops over tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_steps import llama

from meshift.generation.cache import DecodeAttention, KVCache
from meshift.generation.params import Request
from meshift.generation.scheduler import Scheduler
from meshift.layout.layout import Layout
from meshift.planner.cost import Costs
from meshift.planner.decoding import course
from meshift.planner.hardware import KNOWN
from meshift.planner.workload import PlannedCall, Role, Texts

TEXTS = Texts(num_prompts=256, prompt=128, longest_prompt=128, completion=300, longest_completion=1024)
ROLE = Role(name="actor", config=llama(), head="lm")


def test_lengths_have_the_mean_and_the_limit_that_were_asked_for():
    lengths = TEXTS.lengths(20000)
    assert sum(lengths) / len(lengths) == pytest.approx(300, rel=0.01)
    assert max(lengths) == 1024
    assert TEXTS.alive(400) == pytest.approx(sum(n > 400 for n in lengths) / 20000, abs=0.01)


def test_the_course_of_a_generation_is_that_of_slots_filled_one_by_one():
    found = course(TEXTS, 100, 16)
    assert sum(span.steps * span.live for span in found.spans) == pytest.approx(sum(TEXTS.lengths(100)), rel=0.001)
    assert max(span.live for span in found.spans) <= 16
    assert course(TEXTS, 100, 100).num_steps == TEXTS.longest_of(100)
    assert found.num_steps > course(TEXTS, 100, 32).num_steps
    assert found.ended[0] == 0
    assert found.ended[-1] == 1


def engines_steps(lengths, slots):
    """Decode steps of one engine, as its scheduler has them."""
    requests = [Request(index=i, tokens=(i,)) for i in range(len(lengths))]
    scheduler, live, steps = Scheduler(requests, num_slots=slots, prefill_budget=1 << 30), [], 0
    while not scheduler.done:
        for entry in scheduler.schedule().entering:
            live += [int(lengths[request.index]) for request in entry.requests]
        passed = min(live)  # until then nothing changes
        live = [left - passed for left in live]
        steps += passed
        ended = [i for i, left in enumerate(live) if left == 0]
        for source, target in scheduler.leave(ended):
            live[target] = live[source]
        live = live[: scheduler.num_live]
    return steps


@pytest.mark.parametrize(
    ("ranks", "slots"), [(1, 512), (8, 64), (64, 8), (128, 4), (1, 64), (8, 8), (8, 16), (64, 4)]
)
@pytest.mark.parametrize("most", [1024, 2048])
def test_a_generation_takes_as_many_steps_as_that_of_the_slowest_of_many_engines_that_draw_lengths(
    ranks, slots, most
):
    """512 sequences, by the engine's own scheduler, in the mean over random lengths."""
    texts, draw = replace(TEXTS, num_prompts=512, longest_completion=most), np.random.default_rng(5)
    count, found = 512 // ranks, []
    for _ in range(40 if slots == count else 12):
        drawn = np.minimum(np.ceil(draw.exponential(1 / texts.rate, (ranks, count))), most)
        # Engines with neither many tokens nor a long sequence cannot be the last.
        last = {*np.argsort(drawn.sum(1))[-4:].tolist(), *np.argsort(drawn.max(1))[-4:].tolist()}
        found.append(max(engines_steps(drawn[i], slots) for i in last))
    assert course(texts, count, slots, ranks).num_steps == pytest.approx(np.mean(found), rel=0.08)


def test_rows_that_end_late_are_those_of_all_engines_where_none_waits():
    """Of many engines with few sequences, one has the longest of all; the others' have ended long before."""
    texts = replace(TEXTS, num_prompts=512, longest_completion=2048)
    drawing = PlannedCall(name="rollout", role="actor", kind="generate", texts=texts, num_slots=512)
    few, all_at_once = (Costs(ROLE, KNOWN["h100"]).of(drawing, Layout(data=data)).late for data in (128, 1))
    assert few == pytest.approx(all_at_once)
    assert 0 < few < 0.01


@pytest.mark.parametrize("window", [None, 100, 600])
@pytest.mark.parametrize("slots", [16, 200])
def test_the_cache_is_read_as_far_as_windows_let_rows_see(window, slots):
    """Against a loop over the tokens of every sequence."""
    texts = replace(TEXTS, num_prompts=200)
    found = course(texts, 200, slots, 1, (window, None))
    lengths = texts.of_longest(200, 1)
    within = sum(sum(min(128 + n, window or 1 << 30) for n in range(length)) for length in lengths)
    whole = sum(128 * length + length * (length - 1) // 2 for length in lengths)
    assert sum(span.steps * span.cached for span in found.spans) == pytest.approx((within + whole) / 2)


def engines_cells(lengths, slots, window):
    """Positions that the engine reads of one head's cache, where it is no CPU's kernel that reads them."""
    requests = [Request(index=i, tokens=(i,)) for i in range(len(lengths))]
    scheduler, live, cells = Scheduler(requests, num_slots=slots, prefill_budget=1 << 30), [], 0
    cache = KVCache((torch.zeros(slots * 1280),) * 2, (1, slots, 1, 1280, 1))
    while not scheduler.done:
        for entry in scheduler.schedule().entering:
            live += [[128, int(lengths[request.index])] for request in entry.requests]
        places = torch.tensor([place for place, _ in live])
        cache.grow(int(places.max()) + 1, 0)
        shortest, longest = int(places.min()), int(places.max())
        attention = DecodeAttention(cache, places, shortest=shortest, longest=longest)
        attention._on_cpu = False  # as on a GPU
        cells += len(live) * attention._seen_within(window, torch.float32)[1].shape[-1]
        live = [[place + 1, left - 1] for place, left in live]
        ended = [i for i, (_, left) in enumerate(live) if left == 0]
        for source, target in scheduler.leave(ended):
            live[target] = live[source]
        live = live[: scheduler.num_live]
    return cells


@pytest.mark.parametrize("window", [None, 100, 600])
@pytest.mark.parametrize("slots", [16, 100])
def test_all_rows_read_as_far_as_the_longest_where_lengths_are_a_mask(window, slots):
    texts = replace(TEXTS, num_prompts=100)
    found = course(texts, 100, slots, 1, (window,), True)
    lengths = np.random.default_rng(3).permutation(texts.of_longest(100, 1)) if slots < 100 else None
    lengths = texts.of_longest(100, 1) if lengths is None else lengths
    cells = engines_cells(lengths, slots, window)
    read = sum(span.steps * span.cached for span in found.spans)
    assert read == pytest.approx(cells, rel=0.05 if slots < 100 else 1e-9)
    by_row = course(texts, 100, slots, 1, (window,))
    assert read > (1.0 if slots == 100 else 1.1) * sum(span.steps * span.cached for span in by_row.spans)
