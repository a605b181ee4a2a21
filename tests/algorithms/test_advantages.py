"""GAE, rewards, whitening, value normalisation and the KL controller, against loops and closed forms."""

import numpy as np
import pytest
import torch

from meshift.algorithms.advantages import (
    KLController,
    ValueNorm,
    explained_variance,
    gae,
    kl_estimate,
    token_rewards,
    whiten,
)
from meshift.batch import Ragged

LENGTHS = torch.tensor([4, 1, 6, 2])


def normal(lengths, seed):
    draw = torch.Generator().manual_seed(seed)
    return Ragged(torch.randn(int(lengths.sum()), generator=draw, dtype=torch.float64), lengths)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    """Equation 16 written out: A_t = sum over l of (gamma lam)^l delta_{t+l}, each sequence alone."""
    rewards, values = normal(LENGTHS, 0), normal(LENGTHS + 1, 1)
    advantages, returns = gae(rewards, values, gamma, lam)
    for r, v, got, ret in zip(rewards.rows(), values.rows(), advantages.rows(), returns.rows(), strict=True):
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))]
        torch.testing.assert_close(got, torch.stack(expected))
        torch.testing.assert_close(ret, got + v[:-1])


def test_without_discount_returns_are_sums_of_future_rewards_and_the_bootstrap():
    rewards, values = normal(LENGTHS, 0), normal(LENGTHS + 1, 1)
    _, returns = gae(rewards, values, 1.0, 1.0)
    for r, v, got in zip(rewards.rows(), values.rows(), returns.rows(), strict=True):
        torch.testing.assert_close(got, torch.flip(torch.cumsum(torch.flip(r, [0]), 0), [0]) + v[-1])


def test_the_score_is_paid_at_the_last_token_of_scored_rows_only():
    kl = normal(LENGTHS, 2)
    scores, scored = (
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
        torch.tensor([True, True, False, True]),
    )
    rewards = token_rewards(kl, 0.5, scores, scored)
    paid = [(r + 0.5 * k).tolist() for r, k in zip(rewards.rows(), kl.rows(), strict=True)]
    expected = [[0, 0, 0, 1], [2], [0] * 6, [0, 4]]
    assert [pytest.approx(row, abs=1e-12) for row in expected] == paid


def test_kl_estimators_have_the_means_that_theory_gives_them():
    """k1 and k3 are unbiased; k2 is E[(log p/q)^2] / 2; k3 is never negative and less noisy than k1."""
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=draw, dtype=torch.float64).mul(0.6).log_softmax(0) for _ in range(2))
    tokens = torch.multinomial(p.exp(), 400_000, replacement=True, generator=draw)
    k1, k2, k3 = (kl_estimate(p[tokens], q[tokens], name) for name in ("k1", "k2", "k3"))
    exact = float((p.exp() * (p - q)).sum())
    assert exact > 0.1
    assert float(k1.mean()) == pytest.approx(exact, abs=5 * float(k1.std()) / 400_000**0.5)
    assert float(k3.mean()) == pytest.approx(exact, abs=5 * float(k3.std()) / 400_000**0.5)
    assert float(k2.mean()) == pytest.approx(float((p.exp() * (p - q) ** 2).sum() / 2), rel=0.01)
    assert (k3 >= 0).all()
    assert (k1 < 0).any()
    assert k3.std() < k1.std()
    assert torch.equal(kl_estimate(p, p, "k3"), torch.zeros(6, dtype=torch.float64))


def test_whitening_gives_zero_mean_and_unit_variance_over_everything():
    values = normal(torch.tensor([1000]), 3).values.float() * 7 + 100
    white = whiten(values)
    assert white.dtype == torch.float32
    assert float(white.mean()) == pytest.approx(0, abs=1e-5)
    assert float(white.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    exact = values.double().numpy()
    assert np.allclose(white.numpy(), (exact - exact.mean()) / exact.std(), atol=1e-5)


def test_whitening_equal_advantages_gives_zeros():
    assert torch.equal(whiten(torch.full((5,), 3.0)), torch.zeros(5))


def batches_of_returns(num=7):
    return [normal(torch.tensor([20]), seed).values * (1 + seed) + 5 * seed for seed in range(num)]


def test_the_ema_of_returns_is_debiased():
    """After n steps: sum of (1 - b) b^(n-i) mean_i, over 1 - b^n, and likewise the second moment."""
    beta, norm, seen = 0.9, ValueNorm("ema", 0.9), batches_of_returns()
    for returns in seen:
        norm.update(returns)
    shares = np.array([(1 - beta) * beta ** (len(seen) - 1 - i) for i in range(len(seen))]) / (
        1 - beta ** len(seen)
    )
    mean = float(shares @ np.array([r.mean() for r in seen]))
    second = float(shares @ np.array([(r**2).mean() for r in seen]))
    assert norm.mean == pytest.approx(mean, rel=1e-12)
    assert norm.std == pytest.approx((second - mean**2) ** 0.5, rel=1e-12)


def test_the_first_step_of_a_slow_ema_already_knows_mean_and_scale():
    norm = ValueNorm("ema", 0.99995)
    returns = batches_of_returns()[3]
    norm.update(returns)
    assert norm.mean == pytest.approx(float(returns.mean()), rel=1e-9)
    assert norm.std == pytest.approx(float(returns.std(unbiased=False)), rel=1e-9)


def test_cumulative_statistics_are_those_of_everything_seen():
    norm, seen = ValueNorm("cumulative"), batches_of_returns()
    for returns in (*seen, seen[0][:3]):
        norm.update(returns)
    everything = torch.cat([*seen, seen[0][:3]]).numpy()
    assert norm.mean == pytest.approx(everything.mean(), rel=1e-12)
    assert norm.std == pytest.approx(everything.std(), rel=1e-12)


def test_statistics_of_large_fp32_returns_are_kept_in_fp64():
    norm = ValueNorm("cumulative")
    returns = torch.full((4096,), 10_000.0) + torch.linspace(-1, 1, 4096)
    norm.update(returns)
    assert norm.std == pytest.approx(float(returns.double().std(unbiased=False)), rel=1e-6)


@pytest.mark.parametrize("kind", ["ema", "cumulative", "none"])
def test_normalising_and_back_is_the_identity_and_none_is_no_change(kind):
    norm, returns = ValueNorm(kind, 0.9), batches_of_returns()[4]
    assert torch.equal(norm.denormalise(returns), returns), "before any return was seen"
    norm.update(returns)
    torch.testing.assert_close(norm.denormalise(norm.normalise(returns)), returns)
    if kind == "none":
        assert torch.equal(norm.normalise(returns), returns)
    else:
        assert float(norm.normalise(returns).std(unbiased=False)) == pytest.approx(1)


def test_value_statistics_and_kl_coefficient_survive_a_checkpoint():
    one, other = ValueNorm("ema", 0.9), ValueNorm("ema", 0.9)
    seen = batches_of_returns()
    for returns in seen[:3]:
        one.update(returns)
    other.load_state_dict(one.state_dict())
    for norm in (one, other):
        norm.update(seen[3])
    assert one == other
    controller, restored = KLController(0.3, adaptive=True), KLController(0.1, adaptive=True)
    controller.update(100.0, 500)
    restored.load_state_dict(controller.state_dict())
    assert controller == restored


def test_the_adaptive_coefficient_rises_where_kl_is_above_target_and_by_the_published_amount():
    """Trap 2. Ziegler et al. 2019: relative error clipped at 0.2, times sequences over the horizon."""
    for kl, error in ((6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2), (6.0, 0.0)):
        controller = KLController(0.1, adaptive=True, target=6.0, horizon=10_000)
        controller.update(kl, num_sequences=512)
        assert controller.coef == pytest.approx(0.1 * (1 + error * 0.0512)), kl
    fixed = KLController(0.1)
    fixed.update(60.0, 512)
    assert fixed.coef == 0.1


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_the_mean():
    returns = batches_of_returns()[2]
    assert explained_variance(returns, returns) == pytest.approx(1)
    assert explained_variance(returns + 3, returns) == pytest.approx(1), "a constant offset explains all variance"
    assert explained_variance(returns.mean().expand(20), returns) == pytest.approx(0)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(20)) == 0.0
