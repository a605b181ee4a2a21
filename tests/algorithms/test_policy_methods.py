"""Each critic-free method: advantages from the numbers it is given, in closed form; who gets none; its graph."""

import math
import statistics

import pytest
import torch
from tiny_policy import (
    SCHEMAS,
    first_of_rows,
    graph_of,
    host_call,
    make_policy_world,
    policy_config,
    scored_batch,
    train_loss,
)

from meshift.algorithms.dapo import overlong_price
from meshift.algorithms.policy_losses import ClippedLoss, ClippedWeightLoss
from meshift.batch import Outcome, Ragged
from meshift.runtime.rollout_run import sampling_task

NAN = math.nan
SCORES = (1.0, 0.0, 0.0, 0.0, 2.0, 5.0, 2.0, -1.0)  # two prompts of four completions
GROUPS = (SCORES[:4], SCORES[4:])


def advantages(method, scores=SCORES, batch=None, **keys):
    """The first token's advantage in every row, and the metrics."""
    outcome = host_call(policy_config(method, **{method: keys}))(batch or scored_batch(scores))
    return first_of_rows(outcome.batch["advantages"]), outcome


def in_groups(rule):
    return [rule(score, group) for group in GROUPS for score in group]


def standardised(score, group):
    return (score - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)


@pytest.mark.parametrize("method", ["grpo", "dapo", "gspo", "cispo"])
def test_completions_are_measured_by_mean_and_spread_of_their_own_group(method):
    found, _ = advantages(method)
    assert found == pytest.approx(in_groups(standardised), rel=1e-5)


def test_dr_grpo_divides_by_no_spread_and_grpo_can_leave_it_out():
    expected = in_groups(lambda score, group: score - statistics.mean(group))
    assert advantages("dr_grpo")[0] == pytest.approx(expected)
    assert advantages("grpo", scale_rewards="none")[0] == pytest.approx(expected)
    spread = statistics.stdev(SCORES) + 1e-4
    assert advantages("grpo", scale_rewards="batch")[0] == pytest.approx([a / spread for a in expected], rel=1e-5)


def test_rloo_leaves_each_completion_out_of_its_own_baseline():
    expected = in_groups(lambda score, group: score - (sum(group) - score) / 3)
    assert advantages("rloo")[0] == pytest.approx(expected)


def test_every_token_of_a_completion_has_its_advantage():
    batch = scored_batch(SCORES, lengths=[1, 4, 2, 6, 3, 1, 5, 2])
    _, outcome = advantages("grpo", batch=batch)
    rows = outcome.batch["advantages"].rows()
    assert [len(row) for row in rows] == [1, 4, 2, 6, 3, 1, 5, 2]
    assert all(len(set(row.tolist())) == 1 for row in rows)


@pytest.mark.parametrize("method", ["grpo", "rloo", "dr_grpo", "gspo"])
def test_a_group_of_equal_scores_teaches_nothing_and_is_counted(method):
    found, outcome = advantages(method, (0.1, 0.1, 0.1, 0.1, 1.0, 0.0, 0.0, 0.0))
    assert found[:4] == [0.0] * 4
    assert found[4] > 0 > found[5]
    assert outcome.metrics["reward/frac_reward_zero_std"] == 0.5
    assert outcome.metrics["reward/group_std"] == pytest.approx(0.25)


@pytest.mark.parametrize("method", SCHEMAS)
def test_a_completion_that_nothing_scored_is_in_no_baseline_and_not_trained_on(method):
    scores = (NAN, 1.0, 0.0, 0.5, 2.0, NAN, NAN, 5.0)
    extra = {"baseline": [0.0] * 8, "baseline_judged": [True] * 8} if method == "remax" else {}
    found, outcome = advantages(method, batch=scored_batch(scores, **extra))
    assert outcome.batch["trained"].values.tolist() == [not math.isnan(score) for score in scores]
    assert [found[i] for i in (0, 5, 6)] == [0.0] * 3
    assert all(math.isfinite(a) for a in found)
    assert outcome.metrics["objective/no_score_fraction"] == 3 / 8
    if method == "dr_grpo":
        assert found == pytest.approx([0, 0.5, -0.5, 0, -1.5, 0, 0, 1.5])
    if method == "rloo":
        assert found == pytest.approx([0, 0.75, -0.75, 0, -3.0, 0, 0, 3.0])


def test_truncated_completions_are_scored_penalised_or_left_out_as_asked():
    cut = [True, False, False, False, False, True, False, False]
    batch = scored_batch(SCORES, truncated=cut)
    found, outcome = advantages("dr_grpo", batch=batch)
    assert found == pytest.approx(in_groups(lambda score, group: score - statistics.mean(group)))
    assert outcome.metrics["response_length/clip_ratio"] == 0.25
    found, outcome = advantages("dr_grpo", batch=batch, missing_eos_penalty=2.0)
    lowered = [-1.0, 0.0, 0.0, 0.0]
    assert found[:4] == pytest.approx([score - statistics.mean(lowered) for score in lowered])
    assert outcome.metrics["reward/mean"] == pytest.approx(statistics.mean(SCORES)), "as it was given"
    found, outcome = advantages("dr_grpo", batch=batch, mask_truncated_completions=True)
    assert outcome.batch["trained"].values.tolist() == [not is_cut for is_cut in cut]
    assert (found[0], found[5]) == (0.0, 0.0)
    assert found[1] == pytest.approx(-0.25), "its score still counts in the baseline"
    assert outcome.metrics["objective/trained_fraction"] == 0.75


def test_scores_are_clipped_where_asked_and_reported_as_they_are():
    found, outcome = advantages("dr_grpo", reward_clip=1.5)
    clipped = [1.5, 1.5, 1.5, -1.0]
    assert found[4:] == pytest.approx([score - statistics.mean(clipped) for score in clipped])
    assert outcome.metrics["reward/mean"] == pytest.approx(statistics.mean(SCORES))


@pytest.mark.parametrize(("estimator", "cost"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_kl_in_the_reward_is_paid_by_the_whole_completion_where_that_is_the_action(estimator, cost):
    """RLOO: R = score - kl_coef * sum of KL; completions of other lengths pay otherwise."""
    lengths = [1, 2, 3, 4, 1, 1, 1, 1]
    batch = scored_batch(SCORES, lengths=lengths, drift=0.5)
    found, outcome = advantages("rloo", batch=batch, kl_coef=0.4, kl_estimator=estimator)
    rewards = [score - 0.4 * cost * length for score, length in zip(SCORES, lengths, strict=True)][:4]
    assert found[:4] == pytest.approx([r - (sum(rewards) - r) / 3 for r in rewards], rel=1e-5)
    assert outcome.metrics["objective/kl"] == pytest.approx(0.5 * statistics.mean(lengths))
    expected = statistics.mean(SCORES) - 0.4 * 0.5 * statistics.mean(lengths)
    assert outcome.metrics["objective/rlhf_reward"] == pytest.approx(expected)


@pytest.mark.parametrize("method", SCHEMAS)
def test_kl_in_the_loss_is_not_paid_in_the_reward_as_well(method):
    extra = {"baseline": [0.0] * 8, "baseline_judged": [True] * 8} if method == "remax" else {}
    keys = {"kl_coef": 0.4, "kl_in": "loss"}
    without, _ = advantages(method, batch=scored_batch(SCORES, **extra), **keys)
    found, _ = advantages(method, batch=scored_batch(SCORES, drift=0.5, **extra), **keys)
    assert found == without
    assert train_loss(policy_config(method, **{method: keys})).kl_coef == 0.4
    assert train_loss(policy_config(method, **{method: {**keys, "kl_in": "reward"}})).kl_coef == 0.0


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_pays_kl_per_token_and_normalises_over_all_tokens_of_the_step(gamma):
    lengths = [1, 2, 3, 4, 1, 1, 1, 1]
    batch = scored_batch(SCORES, lengths=lengths, drift=0.5)
    _, outcome = advantages("reinforce_pp", batch=batch, kl_coef=0.4, gamma=gamma)
    returns = []
    for score, length in zip(SCORES, lengths, strict=True):
        rewards = [-0.4 * 0.5] * length
        rewards[-1] += score
        returns += [sum(gamma ** (s - t) * rewards[s] for s in range(t, length)) for t in range(length)]
    mean, spread = statistics.mean(returns), statistics.pstdev(returns)
    expected = [(value - mean) / spread for value in returns]
    assert outcome.batch["advantages"].values.tolist() == pytest.approx(expected, rel=1e-4)
    assert outcome.metrics["objective/returns/mean"] == pytest.approx(mean)


def test_the_baseline_form_of_reinforce_pp_centres_groups_before_it_normalises_the_step():
    found, _ = advantages("reinforce_pp", baseline="group", kl_coef=0.0)
    centred = in_groups(lambda score, group: score - statistics.mean(group))
    assert found == pytest.approx([value / statistics.pstdev(centred) for value in centred], rel=1e-5)
    found, _ = advantages("reinforce_pp", (0.1,) * 4 + (1.0, 0.0, 0.0, 0.0), baseline="group", kl_coef=0.0)
    assert found[:4] == [0.0] * 4


def test_remax_takes_the_greedy_score_off_the_returns():
    greedy = [0.5] * 4 + [3.0] * 4
    batch = scored_batch(
        SCORES, lengths=[2] * 8, drift=0.5, baseline=greedy, baseline_judged=[True] * 4 + [False] * 4
    )
    _, outcome = advantages("remax", batch=batch, kl_coef=0.4)
    rows = [row.tolist() for row in outcome.batch["advantages"].rows()]
    for row, score in zip(rows[:4], SCORES[:4], strict=True):
        assert row == pytest.approx([score - 0.5 - 2 * 0.2, score - 0.5 - 0.2])
    assert rows[4:] == [[0.0, 0.0]] * 4, "without a greedy score there is no baseline"
    assert outcome.metrics["reward/over_greedy"] == pytest.approx(statistics.mean(SCORES[:4]) - 0.5)


@pytest.mark.parametrize("keys", [{"reward_clip": 1.0}, {"missing_eos_penalty": 3.0}])
def test_remax_would_hold_shaped_scores_against_a_greedy_score_as_it_was_given(keys):
    """Where every completion earns 5 and runs into the limit, none is better than the greedy one."""
    config = policy_config("remax", remax={"kl_coef": 0.0, **keys})
    outcome = make_policy_world(lambda completion_ids: [5.0 for _ in completion_ids], config).step([[1], [2, 3]])
    assert outcome.batch["truncated"].values.all()
    assert outcome.batch["advantages"].values.abs().max() == 0
    assert outcome.metrics["greedy/reward/mean"] == 5, "as it was given"


def test_the_greedy_completion_pays_for_its_own_end():
    config = policy_config("remax", remax={"kl_coef": 0.0, "missing_eos_penalty": 3.0, "reward_clip": 4.0})
    call = next(call for call in graph_of(config).calls if call.name == "greedy_baseline")
    drawn = Outcome(batch=scored_batch((5.0, 2.0), truncated=[True, False]))
    baseline = call.collect(scored_batch(SCORES), [drawn]).batch["baseline"].values
    assert baseline.tolist() == [1.0] * 4 + [2.0] * 4


def test_each_prompt_is_compared_with_its_own_greedy_completion():
    """What a prompt says first is what any completion of it earns, so the right greedy one leaves no advantage."""
    config = policy_config(
        "remax",
        data={"dataset_name": "unused", "batch_size": 3},
        generation={"num_generations": 2, "max_completion_length": 3},
        remax={"kl_coef": 0.0},
    )

    def reward(prompts, completion_ids):
        return [float(prompt.strip("[]").split(",")[0]) for prompt in prompts]

    outcome = make_policy_world(reward, config).step([[1], [2, 3], [4]])
    assert outcome.batch["baseline"].values.tolist() == [1, 1, 2, 2, 4, 4]
    assert outcome.batch["advantages"].values.abs().max() == 0
    assert outcome.batch["logprobs"].values.max() < 0, "a greedy token has a log-prob of zero"
    assert outcome.metrics["greedy/reward/mean"] == pytest.approx(7 / 3)


def test_running_long_costs_nothing_then_linearly_up_to_the_penalty():
    """Equation 13 of DAPO, with 20 tokens at most and a buffer of 5."""
    lengths = torch.tensor([1, 15, 16, 18, 20])
    assert overlong_price(lengths, 20, 5).tolist() == pytest.approx([0, 0, 0.2, 0.6, 1.0])
    assert overlong_price(lengths, 20, 0).tolist() == [0.0] * 5


def test_the_overlong_price_comes_off_before_completions_are_compared():
    lengths = [2, 4, 5, 6, 2, 2, 2, 2]
    batch = scored_batch((1.0,) * 4 + SCORES[4:], lengths=lengths)
    found, outcome = advantages("dapo", batch=batch, overlong_buffer_length=3, overlong_penalty=0.5)
    shaped = [1.0, 1.0 - 0.5 / 3, 1.0 - 1.0 / 3, 0.5]
    spread = statistics.stdev(shaped) + 1e-4
    assert found[:4] == pytest.approx([(s - statistics.mean(shaped)) / spread for s in shaped], rel=1e-4)
    assert outcome.metrics["reward/overlong_penalty"] == pytest.approx(0.5 * (1 / 3 + 2 / 3 + 1) / 8)


NOTHING_SCORED, ALL_EQUAL = [None], [0.1]


@pytest.mark.parametrize(
    ("method", "keys", "second", "moves"),
    [
        ("grpo", {"kl_coef": 0.0}, ALL_EQUAL, False),
        ("grpo", {"kl_coef": 0.04}, ALL_EQUAL, True),
        ("grpo", {"kl_coef": 0.0, "entropy_coef": 0.01}, ALL_EQUAL, True),
        ("grpo", {"kl_coef": 0.04, "entropy_coef": 0.01}, NOTHING_SCORED, False),
        ("gspo", {"num_mini_batches": 2}, ALL_EQUAL, False),
        ("cispo", {"num_mini_batches": 2}, ALL_EQUAL, False),
        ("dr_grpo", {}, ALL_EQUAL, False),
        ("rloo", {"kl_coef": 0.0}, ALL_EQUAL, False),
        ("rloo", {"kl_coef": 0.1}, ALL_EQUAL, True),
        ("reinforce_pp", {"kl_coef": 0.0}, ALL_EQUAL, False),
        ("remax", {"kl_coef": 0.0}, ALL_EQUAL, False),
    ],
)
def test_a_step_that_teaches_nothing_would_move_the_policy_by_momentum(method, keys, second, moves):
    """The second step has no advantages; KL to the reference (in loss or reward) and entropy teach something."""
    actor = {"model_name_or_path": "unused", "learning_rate": 1e-2, "weight_decay": 0.1}
    config = policy_config(method, actor=actor, **{method: keys})
    is_first = True

    def reward(completion_ids):
        return [float(ids[0] % 3) for ids in completion_ids] if is_first else second * len(completion_ids)

    world, prompts = make_policy_world(reward, config, max_steps=9), [[1], [2, 3], [4], [5]]
    world.step(prompts, 0)
    role = world.roles["actor"]
    version, before = role.version, {name: p.detach().clone() for name, p in role.model.named_parameters()}
    assert version > 0
    is_first = False
    metrics = world.step(prompts, 1).metrics
    assert any(not torch.equal(before[name], p) for name, p in role.model.named_parameters()) == moves
    assert (role.version > version) == moves
    assert metrics.get("actor/skipped_updates", 0) == (0 if moves else config.num_mini_batches)


def test_a_reward_model_and_functions_add_up_by_weight():
    batch = scored_batch(SCORES)
    batch = batch.union(scored_batch([10.0 * s for s in SCORES], key="model_scores"))
    config = policy_config("dr_grpo", reward={"model_name_or_path": "m", "weight": 0.5})
    found = first_of_rows(host_call(config)(batch).batch["advantages"])
    assert found == pytest.approx([6 * a for a in in_groups(lambda s, group: s - statistics.mean(group))])


LOSSES = {
    "grpo": (ClippedLoss, "sequence", "token", (0.2, 0.2)),
    "dr_grpo": (ClippedLoss, "constant", "token", (0.2, 0.2)),
    "dapo": (ClippedLoss, "token", "token", (0.2, 0.28)),
    "gspo": (ClippedLoss, "sequence", "mean", (3e-4, 4e-4)),
    "cispo": (ClippedWeightLoss, "token", None, (1.0, 0.28)),
    "rloo": (ClippedLoss, "sequence", "sequence", (0.2, 0.2)),
    "reinforce_pp": (ClippedLoss, "token", "token", (0.2, 0.2)),
    "remax": (ClippedLoss, "constant", "token", (0.2, 0.2)),
}


@pytest.mark.parametrize("method", SCHEMAS)
def test_each_method_has_the_loss_of_its_paper(method):
    kind, aggregation, importance, clip = LOSSES[method]
    loss = train_loss(policy_config(method))
    assert type(loss) is kind
    assert (loss.aggregation, getattr(loss, "importance", None)) == (aggregation, importance)
    assert (loss.clip_ratio_low, loss.clip_ratio_high) == clip


@pytest.mark.parametrize("method", SCHEMAS)
def test_training_and_reference_read_the_distribution_that_was_sampled(method):
    """Trap 1, and the support of top-k, in every call that reads log-probs."""
    generation = {"temperature": 0.5, "top_k": 7, "min_new_tokens": 2, "num_generations": 4}
    keys = {"kl_coef": 0.1, "recompute_logprobs": True, "num_mini_batches": 2}
    config = policy_config(method, generation=generation, **{method: keys})
    calls = {call.name: call for call in graph_of(config, stops=(3,)).calls}
    readings = [calls["reference"].task, calls["old_logprobs"].task, calls["train_actor"].task.loss.reading]
    for reading in readings:
        assert (reading.temperature, reading.stop_token_ids) == (0.5, (3,))
    for name in ("reference", "old_logprobs", "train_actor"):
        assert {"support", "support_counts", "num_stop_forbidden"} <= set(calls[name].reads)
    assert sampling_task(config, ()).params.temperature == 0.5


@pytest.mark.parametrize("method", SCHEMAS)
def test_without_kl_no_reference_is_called_and_with_it_an_average_may_follow_the_actor(method):
    plain = policy_config(method, **{method: {"kl_coef": 0.0}})
    assert graph_of(plain).roles() == ("actor",)
    moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 3}
    config = policy_config(method, reference=moving, **{method: {"kl_coef": 0.1}})
    calls = {call.name: call for call in graph_of(config).calls}
    sync = calls["sync_reference"]
    assert (sync.source, sync.target, sync.rate, sync.every) == ("actor", "reference", 0.25, 3)
    assert "ref_logprobs" in calls["train_actor"].reads


@pytest.mark.parametrize("method", SCHEMAS)
def test_passes_and_mini_batches_are_as_asked(method):
    config = policy_config(method, **{method: {"num_iterations": 3, "num_mini_batches": 5}})
    task = next(call for call in graph_of(config).calls if call.name == "train_actor").task
    assert (task.num_epochs, task.num_mini_batches) == (3, 5)


def test_log_probs_are_computed_anew_only_where_there_is_more_than_one_update():
    one = policy_config("gspo", gspo={"num_mini_batches": 1})
    assert train_loss(one).old == "current"
    assert "old_logprobs" not in {call.name for call in graph_of(one).calls}
    assert train_loss(policy_config("gspo")).old == "recomputed"
    assert train_loss(policy_config("grpo", grpo={"num_iterations": 2})).old == "sampled"


def test_the_rows_of_a_group_must_be_neighbours():
    """Trap 4: were rows p0 p1 p0 p1, the same scores would give other advantages."""
    mixed = [0, 4, 1, 5, 2, 6, 3, 7]
    batch = scored_batch(SCORES)
    kept, _ = advantages("dr_grpo", batch=batch)
    found, _ = advantages("dr_grpo", batch=batch.index(mixed))
    assert found != pytest.approx([kept[i] for i in mixed])
    assert isinstance(batch["completion_lengths"], Ragged)
