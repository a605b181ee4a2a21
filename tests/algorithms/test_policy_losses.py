"""The critic-free losses against plain loops: ratios, clips, aggregation, KL; and gradients in real models."""

import math

import pytest
import torch
from tiny_rl import random_rollout, tiny_model
from twins import accumulated, hidden_rows, relative_difference, twin_of

from meshift.algorithms.policy_losses import ClippedLoss, ClippedWeightLoss
from meshift.batch import Batch, Ragged
from meshift.training.readings import TokenLogprobs

LONGEST = 6
LENGTHS = [3, 1, 4]
DIFFERENCES = [[0.5, -0.4, 0.1], [0.3], [-0.6, 0.05, 0.25, -0.1]]  # new - old log-prob
ADVANTAGES = [[1.0, 1.0, 1.0], [-2.0], [0.5, 0.5, 0.5, 0.5]]
REF = [[0.2, 0.1, -0.3], [0.4], [0.0, -0.2, 0.3, 0.1]]  # new - reference log-prob
FLAT = [d for row in DIFFERENCES for d in row]
FLAT_ADVANTAGES = [a for row in ADVANTAGES for a in row]


def make(kind=ClippedLoss, **options):
    given = {"reading": TokenLogprobs(), "aggregation": "token", "max_completion_length": LONGEST}
    return kind(**{**given, **options})


def make_batch(trained=(True, True, True)):
    old = Ragged.from_rows([[-1.0] * n for n in LENGTHS], torch.float64)
    new = old.values + Ragged.from_rows(DIFFERENCES, torch.float64).values
    return Batch(
        {
            "completion_lengths": Ragged.scalars(LENGTHS, torch.int64),
            "logprobs": old,
            "advantages": Ragged.from_rows(ADVANTAGES, torch.float64),
            "ref_logprobs": Ragged(new - Ragged.from_rows(REF, torch.float64).values, old.lengths),
            "trained": Ragged.scalars(list(trained)),
        }
    ), new


def run(loss, trained=(True, True, True), entropy=None):
    """The mean that the engine would take, its gradient for each token's log-prob, and the sums."""
    batch, new = make_batch(trained)
    new.requires_grad_(True)
    lengths = batch["logprobs"].lengths
    outputs = {"new_logprobs": Ragged(new, lengths)}
    if entropy is not None:
        outputs["entropy"] = Ragged(entropy, lengths)
    result, count = loss(outputs, batch), loss.count(batch)
    (result.total / count).backward()
    stats = {key: float(value) / count for key, value in result.sums.items()}
    return float(result.total.detach()) / count, new.grad.tolist(), stats


def clipped(advantage, ratio, low=0.2, high=0.2):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def per_token_losses(term):
    return [
        [term(a, d) for a, d in zip(ads, diffs, strict=True)]
        for ads, diffs in zip(ADVANTAGES, DIFFERENCES, strict=True)
    ]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_tokens_are_added_up_as_the_aggregation_says(aggregation):
    losses = per_token_losses(lambda a, d: clipped(a, math.exp(d)))
    expected = {
        "token": sum(map(sum, losses)) / sum(LENGTHS),
        "sequence": sum(sum(row) / len(row) for row in losses) / len(losses),
        "constant": sum(map(sum, losses)) / (len(losses) * LONGEST),
    }
    value, _, stats = run(make(aggregation=aggregation))
    assert value == pytest.approx(expected[aggregation])
    assert stats["pg_loss"] == pytest.approx(expected[aggregation])


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_completion_that_is_not_trained_on_is_in_no_sum_and_no_count(aggregation):
    losses = per_token_losses(lambda a, d: clipped(a, math.exp(d)))
    del losses[1]
    expected = {
        "token": sum(map(sum, losses)) / 7,
        "sequence": sum(sum(row) / len(row) for row in losses) / 2,
        "constant": sum(map(sum, losses)) / (2 * LONGEST),
    }
    value, gradient, _ = run(make(aggregation=aggregation, kl_coef=0.0), trained=(True, False, True))
    assert value == pytest.approx(expected[aggregation])
    assert gradient[3] == 0.0


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_statistics_per_token_do_not_depend_on_what_the_loss_is_divided_by(aggregation):
    loss = make(aggregation=aggregation, max_importance_ratio=1.2, max_update_kl=0.2)
    _, _, stats = run(loss)
    metrics = loss.summarise([{**stats, "grad_norm": 1.0, "logprob_diff_max": 0.6}])
    flat = FLAT
    assert metrics["actor/ppo_kl"] == pytest.approx(-sum(flat) / 8)
    assert metrics["sync/logprob_diff_mean"] == pytest.approx(sum(map(abs, flat)) / 8)
    assert metrics["actor/pg_clipfrac_high"] == pytest.approx(2 / 8), "0.5 and 0.25, where A > 0"
    assert metrics["actor/pg_clipfrac_low"] == 0, "below, but A > 0 there"
    assert loss.stop_reason(stats) is None
    mean_ratio = sum(map(math.exp, flat)) / 8
    assert "mean importance ratio" in make(
        aggregation=aggregation, max_importance_ratio=mean_ratio - 0.01
    ).stop_reason(stats)
    assert "policy KL" in make(aggregation=aggregation, max_update_kl=-sum(flat) / 8 - 0.01).stop_reason(stats)


def test_clip_higher_lets_good_tokens_rise_further_and_no_bad_one():
    _, plain, _ = run(make())
    _, higher, _ = run(make(clip_ratio_high=0.28))
    assert plain[6] == 0.0, "0.25: the ratio is 1.284"
    _, highest, _ = run(make(clip_ratio_high=0.29))
    assert highest[6] == pytest.approx(-0.5 * math.exp(0.25) / 8)
    assert higher[6] == 0.0
    assert plain[3] == higher[3] == highest[3] == pytest.approx(2.0 * math.exp(0.3) / 8), (
        "A < 0: not clipped above"
    )


def test_a_dual_clip_bounds_bad_tokens_whose_ratio_exploded():
    _, plain, _ = run(make())
    value, gradient, _ = run(make(dual_clip=1.3))
    assert plain[3] == pytest.approx(2.0 * math.exp(0.3) / 8)
    assert gradient[3] == 0.0
    assert gradient[:3] + gradient[4:] == plain[:3] + plain[4:]
    assert value == pytest.approx(run(make())[0] - 2.0 * (math.exp(0.3) - 1.3) / 8)


@pytest.mark.parametrize("importance", ["mean", "sequence"])
def test_one_ratio_of_a_whole_completion_moves_all_of_its_tokens(importance):
    """GSPO's ratio is exp of the mean, RLOO's of the sum; equal losses of a completion's tokens are its loss."""
    losses, gradients = [], []
    for advantages, differences in zip(ADVANTAGES, DIFFERENCES, strict=True):
        length = len(differences)
        share = 1 / length if importance == "mean" else 1.0
        ratio = math.exp(sum(differences) * share)
        losses.append(clipped(advantages[0], ratio, 0.1, 0.1))
        free = clipped(advantages[0], ratio, 0.1, 0.1) == -ratio * advantages[0]
        gradients += [-advantages[0] * ratio * share / 3 if free else 0.0] * length
    loss = make(importance=importance, aggregation="sequence", clip_ratio_low=0.1, clip_ratio_high=0.1)
    value, gradient, _ = run(loss)
    assert value == pytest.approx(sum(losses) / 3)
    assert gradient == pytest.approx(gradients)
    assert any(g == 0.0 for g in gradient) == (importance == "sequence")
    assert any(g != 0.0 for g in gradient)


def test_a_clipped_weight_keeps_its_tokens_gradient():
    """CISPO: where the clipped objective is flat, the weight is held at its bound and the token still learns."""
    loss = make(ClippedWeightLoss, clip_ratio_low=0.3, clip_ratio_high=0.28)
    value, gradient, _ = run(loss)
    flat, advantages = FLAT, FLAT_ADVANTAGES
    weights = [min(max(math.exp(d), 0.7), 1.28) for d in flat]
    assert gradient == pytest.approx([-w * a / 8 for w, a in zip(weights, advantages, strict=True)])
    assert value == pytest.approx(
        sum(-w * a * (d - 1) for w, a, d in zip(weights, advantages, flat, strict=True)) / 8
    )
    _, unbounded, _ = run(make(ClippedWeightLoss, clip_ratio_low=1.0))
    assert unbounded[4] == pytest.approx(-math.exp(-0.6) * 0.5 / 8), "without a lower bound a small weight stays"


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: d),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
def test_the_pull_to_the_reference_has_the_estimators_value_and_a_gradient_that_pulls(estimator, value, slope):
    """d/dx of k1 = x - ref is 1 for every token, whatever the distance: on average no pull. It gets k2's."""
    plain_value, plain, _ = run(make(aggregation="sequence"))
    loss = make(aggregation="sequence", kl_coef=0.7, kl_estimator=estimator)
    total, gradient, stats = run(loss)
    kl = sum(sum(map(value, row)) / len(row) for row in REF) / 3
    assert stats["kl_loss"] == pytest.approx(kl)
    assert total == pytest.approx(plain_value + 0.7 * kl)
    expected = [0.7 * slope(d) / (len(row) * 3) for row in REF for d in row]
    assert [g - p for g, p in zip(gradient, plain, strict=True)] == pytest.approx(expected)


def test_the_current_log_probs_as_old_ones_make_every_ratio_one_and_keep_the_gradient():
    _, gradient, stats = run(make(old="current"))
    assert stats["ratio"] == pytest.approx(1.0)
    assert gradient == pytest.approx([-a / 8 for a in FLAT_ADVANTAGES])
    assert stats["logprob_diff_mean"] == pytest.approx(sum(map(abs, FLAT)) / 8), "still measured"


def test_recomputed_log_probs_take_the_samplers_place():
    batch, new = make_batch()
    shifted = batch.union(Batch({"old_logprobs": Ragged(new.detach() - 0.01, batch["logprobs"].lengths)}))
    result = make(old="recomputed")({"new_logprobs": Ragged(new, batch["logprobs"].lengths)}, shifted)
    assert float(result.sums["ratio"]) == pytest.approx(8 * math.exp(0.01))


def test_the_entropy_bonus_is_added_up_like_the_loss():
    entropy = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    plain, _, _ = run(make(aggregation="sequence"))
    value, _, _ = run(make(aggregation="sequence", entropy_coef=0.5), entropy=entropy)
    means = [float(part.mean()) for part in entropy.split(LENGTHS)]
    assert value == pytest.approx(plain - 0.5 * sum(means) / 3)


READING = TokenLogprobs(temperature=0.7, with_entropy=True, entropy_gradient=True)
SHARED = {"reading": READING, "kl_coef": 0.3, "entropy_coef": 0.1}
LOSSES = {
    "grpo": make(aggregation="sequence", **SHARED),
    "dr_grpo": make(aggregation="constant", **SHARED),
    "dapo": make(clip_ratio_high=0.28, **SHARED),
    "gspo": make(importance="mean", aggregation="sequence", **SHARED),
    "cispo": make(ClippedWeightLoss, **SHARED),
    "rloo": make(importance="sequence", aggregation="sequence", **{**SHARED, "kl_estimator": "k1"}),
}


def rollout():
    """A random rollout with a reference near the policy's own log-probs; two rows are not trained on."""
    batch = random_rollout()
    lengths = batch["completion_lengths"].values
    draw = torch.Generator().manual_seed(3)
    near = batch["logprobs"].values + 0.3 * torch.randn(int(lengths.sum()), generator=draw)
    trained = [i not in (2, 5) for i in range(len(lengths))]
    return batch.union(Batch({"ref_logprobs": Ragged(near, lengths), "trained": Ragged.scalars(trained)}))


@pytest.mark.parametrize("name", LOSSES)
def test_the_number_of_micro_batches_changes_neither_gradient_nor_statistics(name):
    """Traps 5, 6 and 7, for every way of adding up."""
    whole, stats = accumulated("lm", LOSSES[name], rollout(), 1)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for num_parts in (2, 7):
        gradients, others = accumulated("lm", LOSSES[name], rollout(), num_parts)
        assert relative_difference(gradients, whole) < 1e-6
        assert others == pytest.approx(stats, rel=1e-4, abs=1e-6)


def test_grpos_gradient_is_that_of_a_plain_computation_in_transformers(tmp_path):
    """DeepSeekMath, equation 3, row by row: temperature in the logits (trap 1), k3, means of means."""
    batch = rollout()
    loss = make(aggregation="sequence", reading=TokenLogprobs(temperature=0.7), kl_coef=0.3)
    ours, stats = accumulated("lm", loss, batch, 2)
    twin, gradients = twin_of(tiny_model(), tmp_path)
    rows, lengths = batch["tokens"].rows(), batch["completion_lengths"].values.tolist()
    table = torch.log_softmax(twin.lm_head(hidden_rows(twin, rows)) / 0.7, -1)
    means = []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        terms = []
        for t in range(length):
            place = len(row) - length + t
            logprob = table[i, place - 1, row[place]]
            ratio, advantage = (
                torch.exp(logprob - batch["logprobs"].rows()[i][t]),
                batch["advantages"].rows()[i][t],
            )
            distance = batch["ref_logprobs"].rows()[i][t] - logprob
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            terms.append(-surrogate + 0.3 * (torch.exp(distance) - distance - 1))
        if bool(batch["trained"].values[i]):
            means.append(torch.stack(terms).mean())
    value = torch.stack(means).mean()
    value.backward()
    assert stats["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert relative_difference(ours, gradients()) < 1e-5
