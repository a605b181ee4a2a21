"""Rewards per token, generalised advantage estimation, advantage and value normalisation, the KL controller.

Pure arithmetic over ragged tensors: no models here. Sources: Schulman et al. 2016 (GAE), Ziegler et al. 2019
(KL penalty and its controller), Schulman 2020 (k1, k2, k3), Xu et al. 2024 (normalisation as used for PPO).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshift.batch import Ragged

LARGEST_LOG_RATIO = 20.0
"""Nats beyond which exp is continued by its tangent; a sum of squares of gradients is then a number in fp32."""


def exp_of_ratio(log: Tensor) -> Tensor:
    """exp(log), and beyond `LARGEST_LOG_RATIO` its tangent there: finite, with a gradient that is too.

    A log-ratio of a completion is a sum over its tokens, and exp overflows fp32 at 88. A clamp alone would have no
    gradient, so that what has gone furthest would be the only thing that nothing pulls back.
    """
    beyond = (log - LARGEST_LOG_RATIO).clamp(min=0.0)
    return torch.exp(log.clamp(max=LARGEST_LOG_RATIO)) * (1.0 + beyond)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens the policy drew, in nats.

    With d = logprob - ref_logprob: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative; exp as `exp_of_ratio` continues it).
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    bounded = (-difference).clamp(max=LARGEST_LOG_RATIO)
    beyond = (-difference - LARGEST_LOG_RATIO).clamp(min=0.0)
    return torch.expm1(bounded) + torch.exp(bounded) * beyond + difference


def token_rewards(kl: Ragged, kl_coef: float, scores: Tensor, scored: Tensor) -> Ragged:
    """`-kl_coef * kl` at every completion token, plus the score at the last token of the rows in `scored` [n]."""
    rewards = -kl_coef * kl.values
    last = kl.starts + kl.lengths - 1
    rewards[last[scored]] += scores[scored]
    return Ragged(rewards, kl.lengths)


def gae(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> tuple[Ragged, Ragged]:
    """Advantages and returns of every completion token, both [completion].

    `values` has one entry more per row than `rewards`: the value after the last token, which is zero where the
    sequence has ended and the critic's bootstrap where it was cut off.
    A_t = delta_t + gamma * lam * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t; return_t = A_t + V_t
    (Schulman et al. 2016, equations 11 and 16).
    """
    num_rows, width = len(rewards), int(rewards.lengths.max()) if len(rewards) else 0
    reward_grid = _to_grid(rewards, width)
    value_grid = _to_grid(values, width + 1)
    inside = torch.arange(width) < rewards.lengths[:, None]
    advantage = torch.zeros(num_rows, dtype=reward_grid.dtype)
    advantages = torch.zeros_like(reward_grid)
    for t in range(width - 1, -1, -1):
        delta = reward_grid[:, t] + gamma * value_grid[:, t + 1] - value_grid[:, t]
        advantage = torch.where(inside[:, t], delta + gamma * lam * advantage, 0.0)
        advantages[:, t] = advantage
    returns = advantages + value_grid[:, :-1]
    return Ragged(advantages[inside], rewards.lengths), Ragged(returns[inside], rewards.lengths)


def _to_grid(ragged: Ragged, width: int) -> Tensor:
    grid = ragged.values.new_zeros(len(ragged), width)
    grid[torch.arange(width) < ragged.lengths[:, None]] = ragged.values
    return grid


def whiten(values: Tensor, eps: float = 1e-8) -> Tensor:
    """Zero mean, unit variance over all entries: the tokens of the whole global batch. Statistics in fp64.

    Exactly 0 where all are equal, whatever rounding says of their mean.
    """
    exact = values.double()
    if bool((exact == exact[:1]).all()):
        return torch.zeros_like(values)
    return ((exact - exact.mean()) / torch.sqrt(exact.var(unbiased=False) + eps)).to(values.dtype)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that knows only the mean."""
    variance = returns.double().var(unbiased=False)
    if variance == 0:
        return 0.0
    return float(1.0 - (returns.double() - values.double()).var(unbiased=False) / variance)


@dataclass
class ValueNorm:
    """Running mean and variance of returns, in fp64. Part of a checkpoint.

    `ema`: exponential moving averages with decay `beta`, debiased by 1 - beta^n (as Adam's moments are);
    `cumulative`: over everything ever seen; `none`: the identity.
    """

    kind: str
    beta: float = 0.99995
    weight: float = 0.0
    first: float = 0.0
    second: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of the returns seen."""
        return self.first / self.weight if self.weight > 0 else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the returns seen, at least 0.01; 1 before any was seen."""
        if self.weight == 0:
            return 1.0
        return max(self.second / self.weight - self.mean**2, 1e-4) ** 0.5

    def update(self, returns: Tensor) -> None:
        """Take one step's returns in."""
        if self.kind == "none":
            return
        exact = returns.double()
        # Averages that start at zero and the weight that undoes it decay alike, which is the debiasing.
        keep, add = (self.beta, 1.0 - self.beta) if self.kind == "ema" else (1.0, float(exact.numel()))
        self.weight = keep * self.weight + add
        self.first = keep * self.first + add * float(exact.mean())
        self.second = keep * self.second + add * float(exact.square().mean())

    def normalise(self, returns: Tensor) -> Tensor:
        """Returns in the critic's units."""
        return ((returns.double() - self.mean) / self.std).to(returns.dtype) if self.kind != "none" else returns

    def denormalise(self, values: Tensor) -> Tensor:
        """The critic's outputs in the rewards' units."""
        return (values.double() * self.std + self.mean).to(values.dtype) if self.kind != "none" else values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"weight": self.weight, "first": self.first, "second": self.second}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.weight, self.first, self.second = state["weight"], state["first"], state["second"]


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or steered towards a target. Part of a checkpoint.

    Adaptive (Ziegler et al. 2019, section 2.2): with the *positive* KL of a step,
    `coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_sequences / horizon)`.
    """

    coef: float
    adaptive: bool = False
    target: float = 6.0
    horizon: int = 10000

    def update(self, kl: float, num_sequences: int) -> None:
        """Take one step's KL in: in nats, positive where the policy has moved away from the reference."""
        if self.adaptive:
            error = min(0.2, max(-0.2, kl / self.target - 1.0))
            self.coef *= 1.0 + error * num_sequences / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.coef = state["coef"]


def group_sum(values: Tensor, counted: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
    """For each row of `values` [n]: sum and number of the `counted` [n] rows of its group, in fp64, both [n].

    Rows come in blocks of `num_generations`, the completions of one prompt.
    """
    grid = torch.where(counted, values.double(), 0.0).view(-1, num_generations)
    sums, counts = grid.sum(1), counted.view(-1, num_generations).sum(1)
    return sums.repeat_interleave(num_generations), counts.repeat_interleave(num_generations)


def group_mean(values: Tensor, counted: Tensor, num_generations: int) -> Tensor:
    """Mean over the counted rows of each row's group [n], in fp64; 0 where none is."""
    sums, counts = group_sum(values, counted, num_generations)
    return sums / counts.clamp(min=1)


def group_std(values: Tensor, counted: Tensor, num_generations: int) -> Tensor:
    """Sample standard deviation (divided by count - 1) of each row's group [n], in fp64.

    Exactly 0 where the counted rows are equal, whatever rounding says of their mean, and where fewer than two are.
    """
    exact = values.double()
    squares = (exact - group_mean(values, counted, num_generations)).square()
    sums, counts = group_sum(squares, counted, num_generations)
    std = torch.sqrt(sums / (counts - 1).clamp(min=1))
    return torch.where(has_signal(values, counted, num_generations), std, 0.0)


def has_signal(values: Tensor, counted: Tensor, num_generations: int) -> Tensor:
    """Whether the counted rows of each row's group differ in value, bool [n]."""
    grid, mask = values.double().view(-1, num_generations), counted.view(-1, num_generations)
    highest = grid.masked_fill(~mask, -torch.inf).amax(1)
    lowest = grid.masked_fill(~mask, torch.inf).amin(1)
    return (highest > lowest).repeat_interleave(num_generations)


def leave_one_out(values: Tensor, counted: Tensor, num_generations: int) -> Tensor:
    """Each counted row less the mean of the other counted rows of its group [n]; 0 where there is no other.

    r_i - 1 / (k - 1) * sum over j != i of r_j (Kool et al. 2019, Ahmadian et al. 2024, equation 8).
    """
    exact = values.double()
    sums, counts = group_sum(values, counted, num_generations)
    others = (sums - exact) / (counts - 1).clamp(min=1)
    usable = counted & (counts > 1) & has_signal(values, counted, num_generations)
    return torch.where(usable, exact - others, 0.0)


def returns_to_go(rewards: Ragged, gamma: float) -> Ragged:
    """sum over s >= t of gamma^(s - t) * r_s at every token t, in fp64."""
    width = int(rewards.lengths.max()) if len(rewards) else 0
    grid = _to_grid(Ragged(rewards.values.double(), rewards.lengths), width)
    for t in range(width - 2, -1, -1):
        grid[:, t] += gamma * grid[:, t + 1]
    return Ragged(grid[torch.arange(width) < rewards.lengths[:, None]], rewards.lengths)
