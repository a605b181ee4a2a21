"""Corrections for tokens that older weights drew, against plain loops and against exact expectations."""

import itertools
import math

import pytest
import torch
from tiny_policy import graph_of, host_call, policy_config, scored_batch, train_loss
from tiny_rl import make_world, ppo_config, tiny_model
from twins import accumulated, relative_difference

from meshift.algorithms.losses import PolicyLoss
from meshift.algorithms.off_policy import BEHAVIOUR, Correction, off_policy_metrics
from meshift.algorithms.policy_losses import ClippedLoss, ClippedWeightLoss
from meshift.batch import Batch, Ragged
from meshift.errors import ConfigError
from meshift.models.attention import PackedAttention, packed_positions
from meshift.training.readings import TokenLogprobs

LENGTHS = [3, 1, 4]
MOVED = [[0.15, -0.3, 0.1], [0.25], [-0.3, 0.05, 0.2, -0.1]]  # new - proximal log-prob
BEHIND = [[0.9, -0.4, 0.3], [1.2], [-0.6, 0.05, 0.8, -0.1]]  # proximal - behaviour log-prob
ADVANTAGES = [[1.0, -0.5, 2.0], [-2.0], [0.5, 0.7, -0.3, 0.5]]
REF = [[0.2, 0.1, -0.3], [0.4], [0.0, -0.2, 0.3, 0.1]]  # new - reference log-prob
CORRECTED = {"recompute_logprobs": True, "importance_correction": "token"}


def rows(values):
    return Ragged.from_rows(values, torch.float64)


def make_batch():
    lengths = torch.tensor(LENGTHS)
    drawn = Ragged(torch.full((8,), -1.0, dtype=torch.float64), lengths)
    old = drawn.values + rows(BEHIND).values
    new = old + rows(MOVED).values
    return Batch(
        {
            "completion_lengths": Ragged.scalars(lengths),
            "logprobs": drawn,
            "old_logprobs": Ragged(old, lengths),
            "ref_logprobs": Ragged(new - rows(REF).values, lengths),
            "advantages": rows(ADVANTAGES),
            "trained": Ragged.scalars([True, False, True]),
        }
    ), new


def weights_of(level, cap):
    """By a loop: of each token, or of all before and after it in the completion."""
    logs = [row if level == "token" else [sum(row)] * len(row) for row in BEHIND]
    return [[min(math.exp(log), math.inf if cap is None else cap) for log in row] for row in logs]


def clipped(advantage, moved):
    ratio = math.exp(moved)
    return -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)


def run(loss):
    batch, new = make_batch()
    new.requires_grad_(True)
    result = loss({"new_logprobs": Ragged(new, batch["logprobs"].lengths)}, batch)
    count = loss.count(batch)
    (result.total / count).backward()
    return float(result.total.detach()) / count, new.grad.tolist(), result


def expected_gradient(term_gradient, weight_rows, shares):
    return [
        share * w * term_gradient(a, m)
        for weights, ads, moved, share in zip(weight_rows, ADVANTAGES, MOVED, shares, strict=True)
        for w, a, m in zip(weights, ads, moved, strict=True)
    ]


def clipped_gradient(advantage, moved):
    free = clipped(advantage, moved) == -math.exp(moved) * advantage
    return -math.exp(moved) * advantage if free else 0.0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_decoupled_ppo_clips_against_the_proximal_policy_and_weighs_against_the_sampler(level, cap, aggregation):
    loss = ClippedLoss(
        reading=TokenLogprobs(),
        aggregation=aggregation,
        max_completion_length=6,
        old="recomputed",
        correction=Correction(level=level, cap=cap),
    )
    weights = weights_of(level, cap)
    shares = [1 / 7, 0.0, 1 / 7] if aggregation == "token" else [1 / 6, 0.0, 1 / 8]
    value, gradient, result = run(loss)
    assert value == pytest.approx(
        sum(
            share * w * clipped(a, m)
            for ws, ads, ms, share in zip(weights, ADVANTAGES, MOVED, shares, strict=True)
            for w, a, m in zip(ws, ads, ms, strict=True)
        )
    )
    assert gradient == pytest.approx(expected_gradient(clipped_gradient, weights, shares))
    trained = [*weights[0], *weights[2]]
    stats = {key: float(result.sums[key]) / 7 for key in BEHAVIOUR}
    raw = [*weights_of(level, None)[0], *weights_of(level, None)[2]]
    found = off_policy_metrics([stats])
    assert found["off_policy/ratio_mean"] == pytest.approx(sum(raw) / 7)
    beyond = sum(r > (math.inf if cap is None else cap) for r in raw)
    assert found["off_policy/truncated_fraction"] == pytest.approx(beyond / 7)
    assert found["off_policy/ess"] == pytest.approx(sum(trained) ** 2 / (7 * sum(w * w for w in trained)))


def test_cispo_and_ppo_are_weighted_too():
    correction = Correction(level="token", cap=1.5)
    weights = weights_of("token", 1.5)
    bounded = ClippedWeightLoss(
        reading=TokenLogprobs(),
        aggregation="token",
        max_completion_length=6,
        old="recomputed",
        correction=correction,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
    )
    _, gradient, _ = run(bounded)
    held = expected_gradient(lambda a, m: -min(max(math.exp(m), 0.8), 1.2) * a, weights, [1 / 7, 0.0, 1 / 7])
    assert gradient == pytest.approx(held)
    _, gradient, _ = run(PolicyLoss(reading=TokenLogprobs(), old="recomputed", correction=correction))
    assert gradient == pytest.approx(expected_gradient(clipped_gradient, weights, [1 / 8] * 3))


def test_the_pull_to_the_reference_is_weighted_and_the_entropy_bonus_is_not():
    """KL is a mean over drawn tokens, entropy is known exactly at each."""
    keys = {"reading": TokenLogprobs(), "aggregation": "token", "max_completion_length": 6, "old": "recomputed"}
    batch, new = make_batch()
    zero = batch.union(Batch({"advantages": Ragged(torch.zeros(8), batch["logprobs"].lengths)}))
    outputs = {
        "new_logprobs": Ragged(new, batch["logprobs"].lengths),
        "entropy": rows([[1.0] * n for n in LENGTHS]),
    }
    correction = Correction(level="token", cap=1.5)
    total = ClippedLoss(**keys, kl_coef=0.7, kl_estimator="k2", entropy_coef=0.1, correction=correction)
    weights = weights_of("token", 1.5)
    kl = sum(w * d * d / 2 for i in (0, 2) for w, d in zip(weights[i], REF[i], strict=True))
    assert float(total(outputs, zero).total) == pytest.approx(0.7 * kl - 0.1 * 7)


# Exact expectations: all completions of one prompt, each as often as the older weights draw it.

VOCAB, PROMPT = 6, [1]


def log_policy(model, num_tokens):
    """Log-probs of every token of every completion [VOCAB^n, n], with gradient."""
    completions = list(itertools.product(range(VOCAB), repeat=num_tokens))
    tokens = torch.tensor([[*PROMPT, *completion] for completion in completions])
    lengths = [tokens.shape[1]] * len(tokens)
    hidden = model(tokens.flatten(), packed_positions(lengths), PackedAttention(lengths))
    logs = torch.log_softmax(model.head(hidden), -1).reshape(len(tokens), -1, VOCAB)[:, :-1]
    return logs.gather(-1, tokens[:, 1:, None])[..., 0], tokens


def moved_model(seed=1, by=0.15):
    model = tiny_model(vocab_size=VOCAB, scale=0.3)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))
    return model


def gradients(model, value):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters)
    return dict(zip(names, found, strict=True))


def every_completion(num_tokens, worth, behaviour):
    """A batch of all completions whose advantages are `worth` times the probability with which each is drawn."""
    drawn, tokens = log_policy(behaviour, num_tokens)
    drawn = drawn.detach()
    lengths = torch.full((len(tokens),), num_tokens)
    drawn_with = drawn.sum(1).exp()
    return Batch(
        {
            "tokens": Ragged(tokens.flatten(), lengths + 1),
            "completion_lengths": Ragged.scalars(lengths),
            "logprobs": Ragged(drawn.flatten(), lengths),
            "advantages": Ragged((worth * drawn_with).repeat_interleave(num_tokens), lengths),
            "trained": Ragged.scalars([True] * len(tokens)),
        }
    ), drawn_with


def exact_loss(correction, **keys):
    return ClippedLoss(
        reading=TokenLogprobs(),
        aggregation="constant",
        max_completion_length=1,
        old="current",
        correction=correction,
        **keys,
    )


@pytest.mark.parametrize(("num_tokens", "level"), [(1, "token"), (2, "sequence")])
def test_without_a_correction_the_gradient_is_not_that_of_the_expected_reward_and_with_it_is(num_tokens, level):
    """Summed over all completions by how likely the older weights draw them: nothing is sampled."""
    behaviour, policy = tiny_model(vocab_size=VOCAB, scale=0.3), moved_model()
    worth = torch.randn(VOCAB**num_tokens, generator=torch.Generator().manual_seed(2))
    batch, drawn_with = every_completion(num_tokens, worth, behaviour)
    logs, _ = log_policy(policy, num_tokens)
    on_policy = gradients(policy, -(worth * logs.sum(1).exp()).sum())
    logs, _ = log_policy(policy, num_tokens)
    stale = gradients(policy, -(worth * drawn_with * logs.sum(1)).sum())

    def ours(correction):
        found, _ = accumulated(moved_model(), exact_loss(correction), batch, 3)
        return {name: gradient * len(batch) for name, gradient in found.items()}

    assert relative_difference(ours(None), stale) < 1e-4
    assert relative_difference(ours(None), on_policy) > 0.2, "the bias must be one to be seen"
    assert relative_difference(ours(Correction(level=level)), on_policy) < 1e-4
    capped = ours(Correction(level=level, cap=1.05))
    ratios = (logs.sum(1).exp().detach() / drawn_with).clamp(max=1.05)
    logs, _ = log_policy(policy, num_tokens)
    truncated = gradients(policy, -(worth * drawn_with * ratios * logs.sum(1)).sum())
    assert relative_difference(capped, truncated) < 1e-4
    assert 0.005 < relative_difference(capped, on_policy) < relative_difference(stale, on_policy)


def test_with_a_correction_the_pull_to_the_reference_is_the_gradient_of_the_policys_own_kl():
    """Without, it would be weighted by how often the older weights drew each token."""
    behaviour, policy = tiny_model(vocab_size=VOCAB, scale=0.3), moved_model()
    batch, drawn_with = every_completion(1, torch.zeros(VOCAB), behaviour)
    ref = log_policy(tiny_model(vocab_size=VOCAB, scale=0.3, seed=5), 1)[0].detach()
    logs, _ = log_policy(policy, 1)
    exact = gradients(policy, (logs.exp() * (logs - ref)).sum())
    batch = batch.union(Batch({"ref_logprobs": Ragged(ref.flatten(), batch["logprobs"].lengths)}))

    def ours(correction):
        found: dict[str, torch.Tensor] = {}
        for i in range(VOCAB):  # each completion as often as it is drawn: a KL has no advantage to carry that
            loss = exact_loss(correction, kl_coef=1.0, kl_estimator="k1")
            one, _ = accumulated(moved_model(), loss, batch.index([i]), 1)
            found = {name: found.get(name, 0.0) + drawn_with[i] * gradient for name, gradient in one.items()}
        return found

    assert relative_difference(ours(Correction()), exact) < 1e-4
    assert relative_difference(ours(None), exact) > 0.1


def test_kl_in_the_reward_is_of_the_policy_that_is_trained_where_a_correction_weighs_its_tokens():
    scores = (1.0, 0.0, 0.0, 0.0)
    keys = {"kl_coef": 0.4, **CORRECTED}
    batch = scored_batch(scores, drift=0.5)
    behind = Ragged(batch["logprobs"].values + 0.25, batch["logprobs"].lengths)
    config = policy_config("rloo", rloo=keys)
    found = host_call(config)(batch.union(Batch({"old_logprobs": behind}))).batch["advantages"].rows()
    rewards = [score - 0.4 * 2 * 0.75 for score in scores]
    assert [float(row[0]) for row in found] == pytest.approx([r - (sum(rewards) - r) / 3 for r in rewards])
    graph = graph_of(config)
    assert "old_logprobs" in next(call for call in graph.calls if call.name == "advantages").reads
    assert train_loss(config).old == "recomputed", "the reward needs it, though a step has one update"
    assert train_loss(policy_config("rloo", rloo={**keys, "kl_in": "loss"})).old == "current"


@pytest.mark.parametrize("corrected", [False, True])
def test_ppo_pays_kl_of_the_policy_that_is_trained(corrected):
    """With a correction the graph reads the actor once more, and its rewards are of what was read."""
    ppo = {"kl_coef": 0.5, "whiten_advantages": False, "value_norm": "none", "length_limit_is_end": True}
    config = ppo_config(ppo=ppo | (CORRECTED if corrected else {}), generation={"max_completion_length": 3})
    world = make_world(lambda completion_ids: [0.0] * len(completion_ids), config)
    calls = {call.name: call for call in world.graph.calls}
    assert ("old_logprobs" in calls) == corrected
    batch = world.step([[1], [2, 3]]).batch.select(calls["advantages"].reads)

    def returns(**shifted):
        fields = {key: Ragged(batch[key].values + by, batch[key].lengths) for key, by in shifted.items()}
        return calls["advantages"].function(batch.union(Batch(fields))).batch["returns"].sum_rows()

    paying = "old_logprobs" if corrected else "logprobs"
    assert (returns(**{paying: 0.3}) - returns()).tolist() == pytest.approx([-0.5 * 0.3 * (3 + 2 + 1)] * 2)
    if corrected:
        assert torch.equal(returns(logprobs=0.3), returns())


def test_a_correction_needs_the_trainers_log_probs():
    with pytest.raises(ConfigError, match=r"importance_correction: token .* set it to true"):
        policy_config("grpo", grpo={"importance_correction": "token"})
    with pytest.raises(ConfigError, match=r"importance_correction: sequence .* set it to true"):
        ppo_config(ppo={"importance_correction": "sequence"})
    assert train_loss(policy_config("grpo", grpo=CORRECTED)).correction == Correction(level="token", cap=2.0)


def test_a_ratio_beyond_all_numbers_makes_a_large_weight_and_no_nan():
    """Of a completion, without a cap: exp(90) is infinite in fp32, and infinite times no advantage is NaN."""
    weights = Correction(level="sequence").weights(torch.tensor([0.0, 90.0, 1e4]))
    assert torch.isfinite(weights).all()
    assert (weights * 0.0).sum() == 0.0
    assert weights[0] == 1.0
    assert weights[1] > 1e8
