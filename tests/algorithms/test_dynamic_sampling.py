"""DAPO's sampling: which groups are kept, how many more are drawn, where it ends, and what is reported of it."""

import pytest
import torch
from tiny_policy import first_of_rows, graph_of, host_call, make_policy_world, policy_config, scored_batch

from meshift.algorithms.dynamic_sampling import DynamicSampling, merged_metrics
from meshift.batch import Batch, Outcome, Ragged

GROUP = 2


def rows(scores, first=0):
    """Two completions per prompt; the scores of each."""
    flat = [float(score) for pair in scores for score in pair]
    return Batch(
        {
            "index": Ragged.scalars(list(range(first, first + len(flat)))),
            "function_scores": Ragged.scalars(torch.tensor(flat)),
        }
    )


def run(rounds, *, num_groups=3, max_rounds=10):
    """The loop that `step.py` runs: round k draws prompts from the k-th list. What came out, what was asked."""
    asked = []

    def more_prompts(step, round_number, count):
        asked.append((step, round_number, count))
        return rows(rounds[round_number][:count], first=100 * round_number)

    sampling = DynamicSampling(
        num_groups=num_groups,
        num_generations=GROUP,
        max_rounds=max_rounds,
        weight=1.0,
        more_prompts=more_prompts,
    )
    given, outcomes = rows(rounds[0], first=5 * num_groups * GROUP), []
    while (fed := sampling.feed(given, outcomes)) is not None:
        assert fed["step"].values.tolist() == [5] * len(fed)
        outcomes.append(Outcome(batch=fed, metrics={}))
    return sampling.collect(given, outcomes), asked


EQUAL, APART = (1, 1), (0, 1)


def test_a_step_whose_groups_all_have_signal_is_drawn_once():
    outcome, asked = run([[APART, (3, 2), APART]])
    assert asked == []
    assert outcome.batch["index"].values.tolist() == [30, 31, 32, 33, 34, 35]
    assert outcome.metrics["sampling/num_rounds"] == 1
    assert outcome.metrics["reward/frac_reward_zero_std"] == 0


def test_groups_without_signal_give_way_to_later_ones_and_groups_stay_whole():
    outcome, asked = run([[EQUAL, APART, EQUAL], [APART, (0, 0), (4, 2)]])
    assert asked == [(5, 1, 3)], (
        "two are missing, a third of the groups had signal: six, but no more than a step has"
    )
    assert outcome.batch["index"].values.tolist() == [32, 33, 100, 101, 104, 105]
    assert outcome.metrics["sampling/num_groups"] == 6
    assert outcome.metrics["reward/frac_reward_zero_std"] == 0.5


def test_as_many_prompts_are_drawn_as_the_share_with_signal_says():
    _, asked = run([[APART, APART, EQUAL], [EQUAL] * 3, [APART] * 3])
    assert asked == [(5, 1, 2), (5, 2, 3)], "1 / (2/3) is two; then 1 / (2/5) is three"


def test_the_rounds_are_bounded_and_what_is_missing_is_filled_and_counted():
    outcome, asked = run([[EQUAL, EQUAL, APART], [EQUAL] * 3, [EQUAL] * 3], max_rounds=3)
    assert [number for _, number, _ in asked] == [1, 2]
    assert outcome.metrics["sampling/num_filled"] == 2
    assert len(outcome.batch) == 6
    assert {34, 35} <= set(outcome.batch["index"].values.tolist())


def test_more_groups_with_signal_than_needed_are_cut_at_the_latest():
    outcome, _ = run([[APART, EQUAL, APART], [APART, APART, APART]])
    assert outcome.batch["index"].values.tolist() == [30, 31, 34, 35, 100, 101]
    assert outcome.metrics["sampling/num_filled"] == 0


def test_metrics_are_of_all_that_was_drawn_or_they_would_flatter():
    outcome, _ = run([[EQUAL, APART, EQUAL], [APART, (0, 0), (4, 2)]])
    assert outcome.metrics["reward/mean"] == pytest.approx((1 + 1 + 0 + 1 + 1 + 1 + 0 + 1 + 0 + 0 + 4 + 2) / 12)


def test_seconds_and_counts_of_rounds_are_added_and_means_weighted():
    one = Outcome(
        batch=rows([APART] * 3), metrics={"timing_s/rollout": 2.0, "reward/f": 1.0, "reward/f/num_errors": 1}
    )
    two = Outcome(
        batch=rows([APART]), metrics={"timing_s/rollout": 1.0, "reward/f": 5.0, "reward/f/num_errors": 2}
    )
    assert merged_metrics([one, two]) == {"timing_s/rollout": 3.0, "reward/f": 2.0, "reward/f/num_errors": 3}


def test_peaks_of_memory_are_not_added():
    key, batch = "perf/peak_memory_gb/rollout", rows([APART])
    peaks = [Outcome(batch=batch, metrics={key: peak}) for peak in (1.5, 2.5, 2.0)]
    assert merged_metrics(peaks) == {key: 2.5}


def test_the_whole_step_trains_on_the_rows_that_were_kept():
    """Prompt [1] is always worth the same, so it never stays; the loop hands on every key of the kept rows."""
    config = policy_config(
        "dapo",
        data={"dataset_name": "unused", "batch_size": 4},
        generation={"num_generations": 4, "max_completion_length": 3},
        dapo={"num_mini_batches": 2, "overlong_buffer_length": 0},
    )
    drawn = []

    def more_prompts(step, round_number, count):
        drawn.append(count)
        prompts = [prompt for i in range(count) for prompt in [[2, 3] if i % 2 else [1]] * 4]
        index = torch.arange(len(prompts)) + 1000 * round_number
        return Batch({"prompts": Ragged.from_rows(prompts, torch.int64), "index": Ragged.scalars(index)})

    def reward(prompts, completion_ids):
        return [
            1.0 if prompt == "[1]" else float(sum(ids))
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    world = make_policy_world(reward, config, more_prompts=more_prompts)
    outcome = world.step([[1], [2, 3], [1], [4]])
    starts = [row[0] for row in outcome.batch["prompts"].rows()]
    assert drawn == [4]
    assert len(outcome.batch) == 16
    assert 1 not in starts
    assert outcome.metrics["sampling/num_groups"] == 8
    assert outcome.metrics["kept/reward/frac_reward_zero_std"] == 0
    assert outcome.metrics["reward/frac_reward_zero_std"] == 0.5
    assert outcome.metrics["kept/reward/mean"] != outcome.metrics["reward/mean"]
    tokens, lengths = outcome.batch["tokens"].rows(), outcome.batch["completion_lengths"].values.tolist()
    for row, length, prompt in zip(tokens, lengths, outcome.batch["prompts"].rows(), strict=True):
        assert row[: len(row) - length].tolist() == prompt.tolist()


def test_without_dynamic_sampling_the_step_is_a_plain_one():
    names = [call.name for call in graph_of(policy_config("dapo", dapo={"dynamic_sampling": False})).calls]
    assert names == ["rollout", "reward_functions", "advantages", "train_actor"]
    assert graph_of(policy_config("dapo")).calls[0].name == "sampling"


@pytest.mark.parametrize(
    ("keys", "scores", "lengths", "signal"),
    [
        ({"reward_clip": 1.0}, (2, 3, 5, 4), [2] * 4, False),
        ({}, (2, 3, 5, 4), [2] * 4, True),
        ({"overlong_buffer_length": 3}, (1, 1, 1, 1), [2, 3, 4, 6], True),
        ({"overlong_buffer_length": 3}, (1, 1, 1, 1), [1, 2, 3, 2], False),
        ({"overlong_buffer_length": 0}, (1, 1, 1, 1), [2, 3, 4, 6], False),
    ],
)
def test_a_group_would_count_as_without_signal_whose_advantages_are_not_zero(keys, scores, lengths, signal):
    """Signal is what advantages are made of: clipped scores, less what long completions pay."""
    config = policy_config("dapo", data={"dataset_name": "unused", "batch_size": 1}, dapo=keys)
    call = next(call for call in graph_of(config).calls if call.name == "sampling")
    drawn = scored_batch([float(score) for score in scores], lengths=lengths)
    outcome = call.collect(drawn, [Outcome(batch=drawn)])
    assert outcome.metrics["sampling/num_filled"] == (0 if signal else 1)
    advantages = host_call(config)(outcome.batch).batch["advantages"]
    assert any(first_of_rows(advantages)) == signal
