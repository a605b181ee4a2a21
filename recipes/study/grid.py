"""The paper's synthetic scenario (Xu et al. 2024, section 4.2): 8 prompts, 8 responses, the diagonal is right.

Prompts are one-hot vectors; policy, critic and reward model are MLPs. Preferences are few, so that most responses
to a prompt are in no pair: what does each method do to those? The paper gives no sizes of the MLPs, no number of
pairs, no rates and no steps; `GridSetting` says what is taken here.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from meshift.config.section import Section
from recipes.study.one_token import OneTokenPPO, Pairs, PPOSetting, descend, dpo_loss, reward_loss, tilted

SIZE = 8
METHODS = ("reference", "dpo", "ppo")


class GridSetting(Section):
    """What the scenario leaves open, and how long each method trains."""

    pairs_per_prompt: int = Field(2, ge=1, le=SIZE - 1, description="wrong responses that the right one beats")
    hidden: int = Field(64, ge=1, description="units of each of the two hidden layers")
    beta: float = Field(0.1, gt=0, description="DPO's beta and PPO's KL coefficient")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's, of every model but the critic")
    critic_learning_rate: float = Field(1e-3, gt=0, description="Adam's, of PPO's critic")
    reward_steps: int = Field(300, ge=1, description="whole-batch steps of the reward model")
    dpo_steps: int = Field(300, ge=1, description="whole-batch steps of DPO")
    ppo_steps: int = Field(
        75, ge=1, description="steps of 512 rollouts and 4 updates, so as many updates as DPO's"
    )
    num_points: int = Field(15, ge=1, description="points of the curves over training, besides the first")


class OneHotMLP(nn.Module):
    """One-hot prompt -> numbers, through two hidden layers."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.layers = nn.Sequential(
            *(nn.Linear(SIZE, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()), nn.Linear(hidden, outputs)
        )

    def forward(self, prompts: Tensor) -> Tensor:
        """[n] -> [n, outputs], or [n] for one output."""
        found = self.layers(nn.functional.one_hot(prompts, SIZE).float())
        return found[:, 0] if self.outputs == 1 else found


def draw_pairs(setting: GridSetting, draws: torch.Generator) -> Pairs:
    """For every prompt the right response against wrong ones, drawn without repetition."""
    prompts = torch.arange(SIZE).repeat_interleave(setting.pairs_per_prompt)
    orders = torch.stack([torch.randperm(SIZE - 1, generator=draws) for _ in range(SIZE)])
    wrong = orders[:, : setting.pairs_per_prompt].flatten()
    return Pairs(prompts=prompts, chosen=prompts, rejected=wrong + (wrong >= prompts))


def covered_by(pairs: Pairs) -> Tensor:
    """Which response to which prompt is in a pair, bool [8, 8]."""
    covered = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    covered[pairs.prompts, pairs.chosen] = True
    covered[pairs.prompts, pairs.rejected] = True
    return covered


@torch.no_grad()
def table_of(policy: nn.Module) -> Tensor:
    """p(response | prompt) [8, 8]."""
    return torch.softmax(policy(torch.arange(SIZE)), -1)


def run_seed(setting: GridSetting, seed: int, *, with_ppo: bool = True) -> dict[str, Any]:
    """One seed's pairs, reference, DPO, reward model and PPO: tables and what they do to uncovered responses."""
    torch.manual_seed(seed)
    pairs = draw_pairs(setting, torch.Generator().manual_seed(seed))
    covered = covered_by(pairs)
    reference = OneHotMLP(setting.hidden, SIZE)
    start = table_of(reference)
    dpo, curves = deepcopy(reference), {}
    watched = partial(Curve, start=start, covered=covered, num_points=setting.num_points)
    curve = watched(dpo, steps=setting.dpo_steps)
    loss = partial(dpo_loss, dpo, reference, pairs, setting.beta)
    descend(loss, dpo, steps=setting.dpo_steps, learning_rate=setting.learning_rate, watch=curve)
    curves["dpo"] = curve.points
    rewards = OneHotMLP(setting.hidden, SIZE)
    loss = partial(reward_loss, rewards, pairs)
    descend(loss, rewards, steps=setting.reward_steps, learning_rate=setting.learning_rate)
    scores = rewards(torch.arange(SIZE)).detach()
    tables = {"reference": start, "dpo": table_of(dpo), "optimum": tilted(start, scores, setting.beta)}
    if with_ppo:
        policy = deepcopy(reference)
        curve = watched(policy, steps=setting.ppo_steps)
        _ppo(setting, reference, scores, seed).train(policy, OneHotMLP(setting.hidden, 1), curve)
        tables["ppo"], curves["ppo"] = table_of(policy), curve.points
    return {
        "seed": seed,
        "covered": covered.int().tolist(),
        "scores": scores.tolist(),
        "tables": {name: table.tolist() for name, table in tables.items()},
        "curves": curves,
        "figures": figures_of(tables, scores, covered),
    }


def _ppo(setting: GridSetting, reference: nn.Module, scores: Tensor, seed: int) -> OneTokenPPO:
    keys = PPOSetting(
        steps=setting.ppo_steps,
        learning_rate=setting.learning_rate,
        critic_learning_rate=setting.critic_learning_rate,
        kl_coef=setting.beta,
    )
    return OneTokenPPO(keys, reference, scores, seed)


class Curve:
    """What training does to the uncovered responses, at evenly spaced steps; x is the share of training done."""

    def __init__(self, model: nn.Module, *, start: Tensor, covered: Tensor, num_points: int, steps: int) -> None:
        self.model, self.start, self.covered, self.steps = model, start, covered, steps
        self.due = {round(i * steps / num_points) for i in range(num_points + 1)}
        self.points: list[dict[str, float]] = []

    def __call__(self, step: int) -> None:
        """After so many steps."""
        if step in self.due:
            now = of_uncovered(table_of(self.model), self.start, self.covered)
            self.points.append({"done": step / self.steps, **now})


def of_uncovered(table: Tensor, start: Tensor, covered: Tensor) -> dict[str, float]:
    """Of responses in no pair: their mass per prompt, the share that has risen, the largest rise; and the right's.

    `raised` counts what is above the reference by more than .01; `largest_rise` is the mean over prompts of the
    largest rise among a prompt's uncovered responses, which is negative where all of them fell.
    """
    rise = (table - start).masked_fill(covered, -torch.inf)
    return {
        "mass": float(table.masked_fill(covered, 0.0).sum(1).mean()),
        "raised": float((rise > 0.01).sum() / (~covered).sum()),
        "largest_rise": float(rise.amax(1).mean()),
        "right": float(table.diagonal().mean()),
    }


def kl(policy: Tensor, other: Tensor) -> float:
    """KL(policy || other) in nats, mean over prompts.

    Of the optimum of PPO's objective it is what the policy's own objective lacks to that, over beta.
    """
    return float(torch.xlogy(policy, policy / other.clamp(min=torch.finfo(other.dtype).tiny)).sum(1).mean())


def figures_of(tables: dict[str, Tensor], scores: Tensor, covered: Tensor) -> dict[str, Any]:
    """The same of every final table, the cell that DPO raised most, and where the reward model is wrong."""
    start = tables["reference"]
    rise = (tables["dpo"] - start).masked_fill(covered, -torch.inf)
    cell = divmod(int(rise.argmax()), SIZE)
    above = (scores > scores.diagonal()[:, None]) & ~covered
    return {
        **{name: of_uncovered(table, start, covered) for name, table in tables.items()},
        "ppo_to_optimum": kl(tables["ppo"], tables["optimum"]) if "ppo" in tables else None,
        "marked": {"cell": list(cell), **{name: float(table[cell]) for name, table in tables.items()}},
        "reward_above_right": float(above.any(1).float().mean()),
    }
