"""The study's theory: Meshift's losses on one-token policies against closed forms and plain torch."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from recipes.study import theory as theory_part
from recipes.study.findings import theory_findings
from recipes.study.grid import (
    SIZE,
    GridSetting,
    OneHotMLP,
    covered_by,
    draw_pairs,
    of_uncovered,
    run_seed,
    table_of,
)
from recipes.study.intervals import difference, mean_of
from recipes.study.one_token import OneTokenPPO, Pairs, PPOSetting, descend, dpo_loss, tilted
from recipes.study.setting import TheorySetting
from recipes.study.theory import run_theory
from recipes.study.three_actions import BIASED, REFERENCE, ConstantValue, Table, loss_of, ppo_from, three_actions


@pytest.mark.parametrize("policy", [(0.5, 0.5, 0.0), (0.9, 0.1, 0.0), (0.2, 0.01, 0.79), (1e-3, 1e-9, 0.999)])
def test_the_loss_of_the_counter_example_would_not_be_the_papers(policy):
    a, b, _ = policy
    assert loss_of(policy) == pytest.approx(math.log1p((b / a) ** 0.1), rel=1e-5)


def test_a_policy_on_the_unseen_action_would_not_be_an_optimum_of_dpo():
    assert loss_of(BIASED) < 1e-30
    assert loss_of((0.001, 0.0, 0.999)) < 1e-30
    assert loss_of((0.999, 0.001, 0.0)) > 0.4, (
        "and one that nearly never takes it is not, while it takes the worse"
    )


def test_ppo_would_take_an_action_that_its_reference_never_takes():
    rewards = [1.0, 0.0, 50.0]
    assert tilted(torch.tensor([REFERENCE]), torch.tensor([rewards]), 0.1)[0, 2] == 0
    trained = ppo_from(REFERENCE, rewards, steps=100)
    assert trained[2] == 0
    assert trained[0] > 0.99
    away = ppo_from((0.25, 0.25, 0.5), rewards, steps=100)
    assert away[2] < 0.01, "the KL is worth more than the highest reward"


def test_ppo_on_one_token_would_not_reach_the_optimum_of_its_objective():
    reference, scores = (0.6, 0.3, 0.1), [0.0, 1.0, 0.5]
    setting = PPOSetting(steps=150, learning_rate=0.02, critic_learning_rate=0.05, kl_coef=1.0)
    policy = Table.of_policy(reference)
    OneTokenPPO(setting, Table.of_policy(reference), torch.tensor([scores]), seed=1).train(policy, ConstantValue())
    weights = [p * math.exp(r) for p, r in zip(reference, scores, strict=True)]
    optimum = [w / sum(weights) for w in weights]
    assert policy.probabilities() == pytest.approx(optimum, abs=0.05)
    assert abs(optimum[1] - reference[1]) > 0.15, "or standing still would pass"


def test_dpo_on_the_grid_would_differ_from_a_plain_computation():
    torch.manual_seed(3)
    pairs = draw_pairs(GridSetting(pairs_per_prompt=3), torch.Generator().manual_seed(3))
    reference = OneHotMLP(16, SIZE)
    ours, plain = OneHotMLP(16, SIZE), OneHotMLP(16, SIZE)
    for model in (ours, plain):
        model.load_state_dict(reference.state_dict())
    descend(lambda: dpo_loss(ours, reference, pairs, 0.1), ours, steps=30, learning_rate=0.01)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    one_hot = torch.eye(SIZE)
    start = reference.layers(one_hot).log_softmax(-1).detach()
    for _ in range(30):
        ratio = plain.layers(one_hot).log_softmax(-1) - start
        margins = [ratio[x, w] - ratio[x, lost] for x, w, lost in triples(pairs)]
        loss = -nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(table_of(ours), table_of(plain), atol=1e-3)
    assert (table_of(ours) - table_of(reference)).abs().max() > 0.1


def triples(pairs: Pairs):
    return zip(pairs.prompts.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)


def test_a_pair_would_prefer_a_wrong_response_or_come_twice():
    pairs = draw_pairs(GridSetting(pairs_per_prompt=4), torch.Generator().manual_seed(0))
    found = list(triples(pairs))
    assert len(set(found)) == len(found) == 4 * SIZE
    assert all(x == chosen != rejected for x, chosen, rejected in found)
    assert covered_by(pairs).sum(1).tolist() == [5] * SIZE
    assert covered_by(pairs).diagonal().all()


def test_what_happens_to_uncovered_responses_would_be_miscounted():
    start = torch.full((2, 3), 1 / 3)
    covered = torch.tensor([[True, True, False], [True, False, False]])
    table = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
    found = of_uncovered(table, start, covered)
    assert found["mass"] == pytest.approx((0.5 + 0.1) / 2)
    assert found["raised"] == pytest.approx(1 / 3)
    assert found["largest_rise"] == pytest.approx(((0.5 - 1 / 3) + (0.05 - 1 / 3)) / 2)
    assert found["right"] == pytest.approx((0.2 + 0.05) / 2)


def test_a_seed_would_not_repeat_or_the_curves_would_end_elsewhere_than_the_tables():
    setting = GridSetting(hidden=8, dpo_steps=6, reward_steps=6, ppo_steps=2, num_points=2)
    first, second = run_seed(setting, 5), run_seed(setting, 5)
    assert first == second
    assert first != run_seed(setting, 6)
    for method in ("dpo", "ppo"):
        assert [point["done"] for point in first["curves"][method]] == [0.0, 0.5, 1.0]
        assert first["curves"][method][0]["largest_rise"] == 0.0
        last = {k: v for k, v in first["curves"][method][-1].items() if k != "done"}
        assert last == first["figures"][method]


def test_theory_would_be_computed_again_or_a_changed_setting_would_not(tmp_path, monkeypatch):
    monkeypatch.setattr(theory_part, "three_actions", partial(three_actions, descent_steps=20, ppo_steps=2))
    training = {"hidden": 8, "dpo_steps": 2, "reward_steps": 2, "ppo_steps": 1, "num_points": 1}
    setting = TheorySetting(num_seeds=2, pairs_per_prompt=[1], betas=[0.1], shown=[1, 0.1], training=training)
    told: list[str] = []
    theory = run_theory(setting, tmp_path, told.append)
    assert len(told) == 2
    assert run_theory(setting, tmp_path, told.append) == theory
    assert len(told) == 2
    run_theory(setting.model_copy(update={"betas": [0.1, 1.0]}), tmp_path, told.append)
    assert told[2:] == ["theory: pairs1_beta1"]
    assert {f.verdict for f in theory_findings(theory, setting.shown)[:2]} == {"agrees"}


def test_a_mean_would_lose_its_interval():
    found = mean_of([1.0, 2.0, 3.0])
    half = 4.3027 * 1.0 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-4)
    assert mean_of([4.0]).low == mean_of([4.0]).high == 4.0
    assert difference([3.0, 5.0], [2.0, 4.0]).low == pytest.approx(1.0), "pair by pair nothing varies"


def test_seeds_that_share_the_cores_would_not_be_those_of_one_process():
    grid = GridSetting(reward_steps=5, dpo_steps=5, ppo_steps=2)
    assert theory_part.runs_of(grid, 3, num_processes=2) == theory_part.runs_of(grid, 3, num_processes=1)
