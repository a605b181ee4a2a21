"""DPO's losses and gradients are those of a naive padded computation in `transformers`."""

import math

import pytest
import torch
from tiny_choice import next_probabilities, total_variation
from tiny_rl import tiny_model
from tiny_texts import random_pairs
from twins import accumulated, padded, relative_difference, twin_of

from meshift.algorithms.dpo import dpo_graph, dpo_loss
from meshift.algorithms.losses import DPOLoss
from meshift.batch import Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.runs import DPORunConfig
from meshift.config.sections import TrainableConfig
from meshift.runtime.role import LocalRole
from meshift.step import run_step

BETA = 0.3
LOSSES = {
    "sigmoid": DPOLoss(beta=BETA),
    "smoothed": DPOLoss(beta=BETA, label_smoothing=0.2),
    "ipo": DPOLoss(beta=BETA, loss_type="ipo"),
}


def naive_logps(twin, batch, side):
    """Summed log-probs of each completion and how many tokens it has, by padding and masking."""
    tokens, mask = padded(batch[side].rows())
    logits = twin(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    per_token = torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0]
    inside = mask[:, 1:].bool() & (torch.arange(1, tokens.shape[1]) >= batch["num_prompt_tokens"].values[:, None])
    return (per_token * inside).sum(-1), inside.sum(-1)


def naive_loss(name, twin, batch):
    chosen, num_chosen = naive_logps(twin, batch, "chosen")
    rejected, num_rejected = naive_logps(twin, batch, "rejected")
    ahead = chosen - batch["ref_chosen_logps"].values
    behind = rejected - batch["ref_rejected_logps"].values
    up, down = torch.sigmoid(BETA * (ahead - behind)), torch.sigmoid(BETA * (behind - ahead))
    terms = {
        "sigmoid": -torch.log(up),
        "smoothed": -0.8 * torch.log(up) - 0.2 * torch.log(down),
        "ipo": (ahead / num_chosen - behind / num_rejected - 1 / (2 * BETA)) ** 2,
    }[name]
    return (batch["pair_weight"].values * terms).mean(), BETA * ahead, BETA * behind


@pytest.mark.parametrize("num_parts", [1, 2, 6])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_a_padded_computation_in_transformers(tmp_path, name, num_parts):
    batch = random_pairs()
    ours, stats = accumulated("lm", LOSSES[name], batch, num_parts)
    twin, gradients = twin_of(tiny_model(), tmp_path)
    loss, chosen, rejected = naive_loss(name, twin, batch)
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative_difference(ours, gradients()) < 1e-5
    assert stats["chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert stats["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert stats["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert stats["chosen_logps"] == pytest.approx((chosen / BETA + batch["ref_chosen_logps"].values).mean().item())


@pytest.mark.parametrize("name", LOSSES)
def test_checkpointing_and_chunking_change_no_gradient_of_dpo(name):
    plain, _ = accumulated("lm", LOSSES[name], random_pairs(), 2)
    frugal, _ = accumulated("lm", LOSSES[name], random_pairs(), 2, gradient_checkpointing=True, logits_chunk=3)
    assert relative_difference(frugal, plain) < 1e-6


def test_each_loss_has_its_minimum_where_its_paper_says():
    """IPO wants a gap of 1 / (2 beta) per token; smoothed DPO wants sigmoid(margin) = 1 - smoothing; DPO more."""
    margin = math.log(0.8 / 0.2)
    gaps = {"ipo": 1 / (2 * BETA), "smoothed": margin / BETA, "sigmoid": None}
    for name, best in gaps.items():
        slope = {gap: slope_at(LOSSES[name], gap) for gap in (0.5, best or 5.0, 50.0)}
        if best is None:
            assert all(value < 0 for value in slope.values())
        else:
            assert slope[0.5] < 0 < slope[50.0]
            assert slope[best] == pytest.approx(0.0, abs=1e-9)


def slope_at(loss, gap):
    """The gradient of the chosen log-prob where it is `gap` nats ahead, per token, of completions of 4 tokens."""
    num_tokens = 4 if loss.loss_type == "ipo" else 1
    chosen = torch.tensor([gap * num_tokens], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    batch = Batch(
        {
            "chosen": Ragged.from_rows([[1] * 6]),
            "rejected": Ragged.from_rows([[1] * 6]),
            "num_prompt_tokens": Ragged.scalars([2]),
            "ref_chosen_logps": Ragged.scalars(zero),
            "ref_rejected_logps": Ragged.scalars(zero),
        }
    )
    outputs = {"chosen_logps": Ragged.scalars(chosen), "rejected_logps": Ragged.scalars(zero)}
    loss(outputs, batch).total.backward()
    return chosen.grad.item()


def config_for(**sections):
    values = {
        "output_dir": "unused",
        "data": {"dataset_name": "unused"},
        "actor": {"model_name_or_path": "unused"},
    }
    return make_config(DPORunConfig, values | sections)


def inputs():
    batch = random_pairs()
    return batch.select(("chosen", "rejected", "num_prompt_tokens", "pair_weight", "where"))


def trained(config, num_steps, batch):
    rate = TrainableConfig(learning_rate=0.005)
    actor = LocalRole("actor", tiny_model(), rate, trainable=True, max_steps=num_steps)
    roles = {"actor": actor, "reference": LocalRole("reference", tiny_model(), TrainableConfig())}
    return [run_step(dpo_graph(config), roles, batch, step).metrics for step in range(num_steps)], roles


@pytest.mark.parametrize("known", [False, True])
def test_a_pairs_weight_that_the_graph_did_not_hand_on_would_count_as_one(known):
    batch = inputs()
    weights = batch["pair_weight"].values
    assert weights.mean() != pytest.approx(1.0, abs=0.01), "the weights could not be told from none"
    config = config_for(dpo={"precompute_ref_log_probs": known})
    if known:
        reference = LocalRole("reference", tiny_model(), TrainableConfig())
        batch = batch.union(reference.infer(dpo_graph(config_for()).calls[0].task, batch).batch)
    metrics, _ = trained(config, 1, batch)
    assert metrics[0]["loss"] == pytest.approx(weights.mean().item() * math.log(2), rel=1e-5)


def test_every_key_of_the_config_reaches_the_loss():
    keys = {"beta": 0.7, "label_smoothing": 0.2}
    assert dpo_loss(config_for(dpo=keys)) == DPOLoss(**keys)
    assert dpo_loss(config_for(dpo={"loss_type": "ipo", "beta": 0.7})) == DPOLoss(loss_type="ipo", beta=0.7)


def test_with_the_reference_as_actor_the_first_loss_is_log_two_and_the_margin_then_grows():
    even = Batch({"pair_weight": Ragged.scalars(torch.ones(6))})
    metrics, _ = trained(config_for(), 6, inputs().union(even))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    margins = [row["rewards/margins"] for row in metrics]
    assert margins == sorted(margins)
    assert margins[-1] > 0.1
    assert metrics[-1]["accuracy"] == 1.0
    names = {f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")}
    names |= {"logps/chosen", "logps/rejected", "loss", "accuracy", "margin", "grad_norm", "lr"}
    assert names <= set(metrics[0])


def test_the_reference_stands_still_unless_it_is_told_to_follow():
    _, still = trained(config_for(), 2, inputs())
    fresh = dict(tiny_model().named_parameters())
    weights = still["reference"].master_weights()
    assert all(torch.equal(weights[name], fresh[name]) for name in fresh)
    following = config_for(reference={"sync_ref_model": True, "ref_model_mixup_alpha": 1.0})
    _, moved = trained(following, 2, inputs())
    ours, theirs = moved["reference"].master_weights(), moved["actor"].master_weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_with_log_probs_known_in_advance_no_call_needs_a_reference():
    graph = dpo_graph(config_for(dpo={"precompute_ref_log_probs": True}))
    assert graph.roles() == ("actor",)
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= graph.inputs
    assert dpo_graph(config_for()).roles() == ("reference", "actor")


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_ipo_does_not_become_the_reference_tilted_by_the_share_of_others_that_a_completion_beats(beta):
    """Azar et al. 2023, with Psi the identity: pi* = ref exp(p(y beats one drawn uniformly) / tau) / Z.

    Given are all ordered pairs of K tokens, weighted by how often the first wins. With h the log-ratio, the sum of
    p_ij (h_i - h_j - 1 / (2 beta))^2 is least where K h_i is the sum of (2 p_ij - 1) / (2 beta), up to a constant.
    """
    num_tokens, num_steps = 8, 80
    strength = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.8, 0.2, -1.0, 0.4])
    wins = torch.sigmoid(2 * (strength[:, None] - strength[None, :]))
    pairs = [(i, j) for i in range(num_tokens) for j in range(num_tokens) if i != j]
    batch = Batch(
        {
            "chosen": Ragged.from_rows([[1, i] for i, _ in pairs], torch.int64),
            "rejected": Ragged.from_rows([[1, j] for _, j in pairs], torch.int64),
            "num_prompt_tokens": Ragged.scalars([1] * len(pairs), torch.int64),
            "pair_weight": Ragged.scalars(torch.stack([wins[i, j] for i, j in pairs])),
        },
        {"where": ["here"] * len(pairs)},
    )
    config = config_for(dpo={"loss_type": "ipo", "beta": beta})
    model = {"vocab_size": num_tokens, "scale": 0.2}
    how = TrainableConfig(learning_rate=5e-3, lr_scheduler_type="linear")
    roles = {
        "actor": LocalRole("actor", tiny_model(**model), how, trainable=True, max_steps=num_steps),
        "reference": LocalRole("reference", tiny_model(**model), TrainableConfig()),
    }
    for step in range(num_steps):
        run_step(dpo_graph(config), roles, batch, step)
    reference = next_probabilities(tiny_model(**model), [1])
    beaten = (wins.sum(1) - 0.5) / num_tokens  # with itself it ties
    optimum = torch.softmax(reference.log() + beaten / beta, -1)
    h = (2 * wins - 1).sum(1) / (2 * beta * num_tokens)
    assert torch.allclose(torch.softmax(reference.log() + h, -1), optimum), "the two forms are one"
    actor = next_probabilities(roles["actor"].model, [1])
    assert total_variation(reference, optimum) > 0.15, "the optimum must not be where training starts"
    assert total_variation(actor, optimum) < 0.01
