"""ORPO and SimPO: losses and gradients of a naive padded computation, and optima that are known in advance."""

import math

import pytest
import torch
from tiny_choice import VOCAB, next_probabilities
from tiny_rl import tiny_model
from tiny_texts import random_pairs
from twins import accumulated, padded, relative_difference, twin_of

from meshift.algorithms.orpo import orpo_graph, orpo_loss
from meshift.algorithms.preference_losses import ORPOLoss, SimPOLoss, log_odds
from meshift.algorithms.simpo import simpo_graph, simpo_loss
from meshift.batch import WHERE, Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.runs import ORPORunConfig, SimPORunConfig
from meshift.config.sections import TrainableConfig
from meshift.runtime.role import LocalRole
from meshift.step import run_step

LOSSES = {"orpo": ORPOLoss(beta=0.4), "simpo": SimPOLoss(beta=1.7, gamma=0.6)}
METHODS = {"orpo": (ORPORunConfig, orpo_graph), "simpo": (SimPORunConfig, simpo_graph)}


def config_for(method, **keys):
    values = {
        "output_dir": "unused",
        "data": {"dataset_name": "unused"},
        "actor": {"model_name_or_path": "unused"},
        method: keys,
    }
    return make_config(METHODS[method][0], values)


def mean_logps(twin, batch, side):
    tokens, mask = padded(batch[side].rows())
    logits = twin(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    per_token = torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0]
    inside = mask[:, 1:].bool() & (torch.arange(1, tokens.shape[1]) >= batch["num_prompt_tokens"].values[:, None])
    return (per_token * inside).sum(-1) / inside.sum(-1).clamp(min=1)


def naive(method, chosen, rejected):
    if method == "simpo":
        return -torch.log(torch.sigmoid(1.7 * (chosen - rejected) - 0.6))
    odds = [p.exp() / (1 - p.exp()) for p in (chosen, rejected)]
    ratio = odds[0] / odds[1]
    return -chosen - 0.4 * torch.log(ratio / (1 + ratio))


@pytest.mark.parametrize("num_parts", [1, 2, 6])
@pytest.mark.parametrize("method", LOSSES)
def test_loss_and_gradient_are_those_of_a_padded_computation_in_transformers(tmp_path, method, num_parts):
    batch = random_pairs()
    ours, stats = accumulated("lm", LOSSES[method], batch, num_parts)
    twin, gradients = twin_of(tiny_model(), tmp_path)
    chosen, rejected = (mean_logps(twin, batch, side) for side in ("chosen", "rejected"))
    loss = (batch["pair_weight"].values * naive(method, chosen, rejected)).mean()
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative_difference(ours, gradients()) < 1e-5
    assert stats["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())


def test_the_odds_of_a_certain_text_are_finite():
    given = torch.tensor([0.0, -1e-9, -0.5, -60.0], requires_grad=True)
    odds = log_odds(given)
    odds.sum().backward()
    assert odds.isfinite().all()
    assert given.grad.isfinite().all()
    assert odds[2].item() == pytest.approx(math.log(math.exp(-0.5) / (1 - math.exp(-0.5))), rel=1e-6)


def test_every_key_of_the_config_reaches_the_loss():
    assert orpo_loss(config_for("orpo", beta=0.4)) == LOSSES["orpo"]
    assert simpo_loss(config_for("simpo", beta=1.7, gamma=0.6)) == LOSSES["simpo"]


def slope(method, share, p):
    """The derivative by logit(p) of the mean loss: token a has p, b the rest, and a wins `share` of pairs."""
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    ahead, behind = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
    loss = share * naive(method, ahead, behind) + (1 - share) * naive(method, behind, ahead)
    return torch.autograd.grad(loss, logit)[0].item()


@pytest.mark.parametrize("method", LOSSES)
def test_the_policy_finds_the_minimum_of_pairs_that_contradict_each_other(method):
    """Of two answers one is chosen in three pairs of four; the best probability is found by bisection."""
    low, high = 0.01, 0.99
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(method, 0.75, middle) < 0 else (low, middle)
    sides = [(3, 6)] * 3 + [(6, 3)]
    batch = Batch(
        {
            "chosen": Ragged.from_rows([[1, a] for a, _ in sides]),
            "rejected": Ragged.from_rows([[1, b] for _, b in sides]),
            "num_prompt_tokens": Ragged.scalars([1] * 4),
            "pair_weight": Ragged.scalars([1.0] * 4),
        },
        {WHERE: ["here"] * 4},
    )
    how = TrainableConfig(learning_rate=5e-3, lr_scheduler_type="linear")
    actor = LocalRole("actor", tiny_model(vocab_size=VOCAB, scale=0.2), how, trainable=True, max_steps=150)
    keys = {"orpo": {"beta": 0.4}, "simpo": {"beta": 1.7, "gamma": 0.6}}[method]
    for step in range(150):
        run_step(METHODS[method][1](config_for(method, **keys)), {"actor": actor}, batch, step)
    found = next_probabilities(actor.model, [1])
    assert abs(low - 0.5) > 0.05, "the optimum must not be an even split"
    assert float(found[3] / (found[3] + found[6])) == pytest.approx(low, abs=0.01)
    if method == "orpo":
        assert float(found[3] + found[6]) > 0.97, "the likelihood leaves nothing to others"
