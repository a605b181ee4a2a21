"""Log-ratios that exp cannot hold: losses and gradients stay numbers, and pull back what has gone too far."""

import math

import pytest
import torch
from tiny_rl import ppo_config

from meshift.algorithms.advantages import LARGEST_LOG_RATIO, exp_of_ratio, kl_estimate
from meshift.algorithms.losses import DPOLoss, PolicyLoss
from meshift.algorithms.off_policy import Correction
from meshift.algorithms.policy_losses import ClippedLoss, ClippedWeightLoss, LikelihoodLoss
from meshift.algorithms.preference_losses import KTOLoss, ORPOLoss, SimPOLoss
from meshift.batch import Batch, Ragged
from meshift.training.readings import TokenLogprobs

NUM_TOKENS = 50
KINDS = {
    "sequence": (ClippedLoss, {"importance": "sequence"}),
    "mean": (ClippedLoss, {"importance": "mean"}),
    "token": (ClippedLoss, {"importance": "token"}),
    "cispo": (ClippedWeightLoss, {}),
    "likelihood": (LikelihoodLoss, {}),
}


def loss_and_gradient(loss, drift, advantage, trained=(True, True), ref=0.0):
    """Two completions in fp32; the first has moved by `drift` nats a token, the second not at all."""
    lengths = torch.tensor([NUM_TOKENS, 3])
    old = torch.full((NUM_TOKENS + 3,), -2.0)
    new = old.clone()
    new[:NUM_TOKENS] += drift
    new.requires_grad_(True)
    batch = Batch(
        {
            "completion_lengths": Ragged.scalars(lengths),
            "logprobs": Ragged(old, lengths),
            "old_logprobs": Ragged(new.detach(), lengths),
            "ref_logprobs": Ragged(old + ref, lengths),
            "advantages": Ragged(torch.full_like(old, advantage), lengths),
            "trained": Ragged.scalars(torch.tensor(trained)),
        }
    )
    result = loss({"new_logprobs": Ragged(new, lengths)}, batch)
    assert all(math.isfinite(value) for value in result.sums.values())
    (result.total / loss.count(batch)).backward()
    return float(result.total.detach()), new.grad


def make(name, **keys):
    kind, options = KINDS[name]
    given = {"reading": TokenLogprobs(), "aggregation": "sequence", "max_completion_length": 64}
    return kind(**given, **options, **keys)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_completion_that_has_moved_by_hundreds_of_nats_would_give_a_loss_that_is_no_number(name, advantage):
    for drift in (10.0, 200.0, -200.0):
        value, gradient = loss_and_gradient(make(name), drift, advantage)
        assert math.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(gradient.square().sum()), "the norm of a gradient is taken in fp32"


@pytest.mark.parametrize("name", ["sequence", "mean", "token"])
def test_a_bad_completion_that_has_become_far_too_likely_is_still_pushed_down(name):
    _, gradient = loss_and_gradient(make(name), 200.0, -1.0)
    assert (gradient[:NUM_TOKENS] > 0).all(), "descent lowers its log-probs"
    _, gradient = loss_and_gradient(make(name, dual_clip=3.0), 200.0, -1.0)
    assert (gradient[:NUM_TOKENS] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_weight_without_a_cap_would_give_a_gradient_without_a_norm(level):
    loss = make("token", old="recomputed", correction=Correction(level=level))
    value, gradient = loss_and_gradient(loss, 200.0, -1.0)
    assert math.isfinite(value)
    assert gradient.abs().max() > 1e6
    assert torch.isfinite(gradient.square().sum())


@pytest.mark.parametrize("drift", [200.0, math.inf, math.nan])
@pytest.mark.parametrize("name", KINDS)
def test_a_completion_that_is_not_trained_would_make_the_loss_no_number(name, drift):
    loss = make(name, kl_coef=0.1, correction=Correction())
    value, gradient = loss_and_gradient(loss, drift, 1.0, trained=(False, True))
    alone, expected = loss_and_gradient(loss, 0.0, 1.0, trained=(False, True))
    assert value == alone
    assert torch.equal(gradient, expected)


def test_k3_would_overflow_and_must_pull_back_what_the_reference_finds_likelier():
    for apart in (30.0, 100.0, 1000.0):
        new = torch.tensor([-2.0 - apart], requires_grad=True)
        kl = kl_estimate(new, torch.tensor([-2.0]), "k3")
        kl.sum().backward()
        assert torch.isfinite(kl).all()
        assert torch.isfinite(new.grad).all()
        assert new.grad < -1e8, "descent raises the log-prob"
    value, gradient = loss_and_gradient(make("token", kl_coef=0.1), 0.0, 0.0, ref=150.0)
    assert math.isfinite(value)
    assert (gradient < 0).all()


def test_nothing_changes_below_the_limit_and_beyond_it_exp_goes_on_by_its_tangent():
    log = torch.linspace(-90, LARGEST_LOG_RATIO, 200, requires_grad=True)
    assert torch.equal(exp_of_ratio(log), torch.exp(log))
    assert torch.equal(torch.autograd.grad(exp_of_ratio(log)[:-1].sum(), log)[0][:-1], torch.exp(log)[:-1])
    d = torch.linspace(-LARGEST_LOG_RATIO, 90, 200, dtype=torch.float64)
    exact = torch.expm1(-d) + d
    assert torch.equal(kl_estimate(d, torch.zeros_like(d), "k3"), exact)
    top = math.exp(LARGEST_LOG_RATIO)
    beyond = exp_of_ratio(torch.tensor([LARGEST_LOG_RATIO + 5], dtype=torch.float64))
    assert float(beyond) == pytest.approx(6 * top)
    assert float(exp_of_ratio(torch.tensor(-math.inf))) == 0


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_the_loss_of_ppo_stays_a_number(advantage):
    loss = PolicyLoss(reading=TokenLogprobs(), entropy_coef=ppo_config().ppo.entropy_coef)
    lengths = torch.tensor([4])
    new = torch.full((4,), 198.0, requires_grad=True)
    fields = {"logprobs": Ragged(torch.full((4,), -2.0), lengths)}
    batch = Batch({**fields, "advantages": Ragged(torch.full((4,), advantage), lengths)})
    result = loss({"new_logprobs": Ragged(new, lengths)}, batch)
    result.total.backward()
    assert all(math.isfinite(float(value)) for value in (result.total.detach(), *result.sums.values()))
    assert torch.isfinite(new.grad.square().sum())


@pytest.mark.parametrize("apart", [1e4, -1e4])
@pytest.mark.parametrize("loss", [DPOLoss(), DPOLoss(loss_type="ipo"), ORPOLoss(), SimPOLoss(), KTOLoss()])
def test_losses_of_pairs_hold_any_log_ratio(loss, apart):
    logps = torch.tensor([-2e4, -2e4 + apart], requires_grad=True)
    outputs = {"logps": Ragged.scalars(logps)}
    outputs |= {f"{side}_logps": Ragged.scalars(logps[i : i + 1]) for i, side in enumerate(("chosen", "rejected"))}
    one = torch.zeros(1) - 2e4
    pair = {
        "chosen": Ragged.from_rows([[1, 2, 3]]),
        "rejected": Ragged.from_rows([[1, 4]]),
        "num_prompt_tokens": Ragged.scalars([1], torch.int64),
        "ref_chosen_logps": Ragged.scalars(one),
        "ref_rejected_logps": Ragged.scalars(one),
    }
    rows = {
        "ref_logps": Ragged.scalars(torch.cat([one, one])),
        "label": Ragged.scalars([True, False], torch.bool),
        "kl_term": Ragged.scalars([3.0, 3.0]),
    }
    result = loss(outputs, Batch(rows if isinstance(loss, KTOLoss) else pair))
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(logps.grad).all()
