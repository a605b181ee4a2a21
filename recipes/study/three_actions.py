"""The paper's counter-example (Xu et al. 2024, table 1): three actions, one preference, no prompt.

The reference never takes the third action, and the only preference is of the first over the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recipes.study.one_token import OneTokenPPO, Pairs, PPOSetting, descend, dpo_loss, reward_loss, tilted

REFERENCE = (0.5, 0.5, 0.0)
BIASED = (0.1, 0.0, 0.9)
"""The policy of the paper's table that DPO may end at."""
POLICIES = (REFERENCE, (0.9, 0.1, 0.0), (1.0, 0.0, 0.0), BIASED, (0.001, 0.0, 0.999))
STARTS = ((0.495, 0.495, 0.01), (0.25, 0.25, 0.5), (0.05, 0.05, 0.9))
NEVER = -1000.0
"""The logit of probability 0: exp(-1000) is exactly 0, while log-ratios stay finite."""
BETA = 0.1
PREFERENCE = Pairs(prompts=torch.tensor([0]), chosen=torch.tensor([0]), rejected=torch.tensor([1]))


class Table(nn.Module):
    """A number for each response to each prompt, free of one another."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor(rows))

    def forward(self, prompts: Tensor) -> Tensor:
        """[n] -> [n, responses]."""
        return self.numbers[prompts]

    @classmethod
    def of_policy(cls, probabilities: Sequence[float]) -> Table:
        """Logits of the given probabilities."""
        return cls([[math.log(p) if p > 0 else NEVER for p in probabilities]])

    def probabilities(self) -> list[float]:
        """Of the first prompt."""
        return torch.softmax(self.numbers.detach()[0], -1).tolist()


class ConstantValue(nn.Module):
    """A critic that knows no prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, prompts: Tensor) -> Tensor:
        """[n] -> [n]."""
        return self.value.expand(len(prompts))


def loss_of(policy: Sequence[float], reference: Sequence[float] = REFERENCE) -> float:
    """DPO's loss of a policy, exactly: 0 is the least that there is."""
    return float(dpo_loss(Table.of_policy(policy), Table.of_policy(reference), PREFERENCE, BETA).detach())


def learned_reward(unseen: float, steps: int) -> list[float]:
    """Scores after the reward model's training, where the third action's began at `unseen`."""
    scores = Table([[0.0, 0.0, unseen]])
    descend(lambda: reward_loss(scores, PREFERENCE), scores, steps=steps, learning_rate=0.01)
    return scores.numbers.detach()[0].tolist()


def dpo_from(start: Sequence[float], steps: int) -> list[float]:
    """Where gradient descent on DPO's loss ends that begins at `start`."""
    policy, reference = Table.of_policy(start), Table.of_policy(REFERENCE)
    descend(lambda: dpo_loss(policy, reference, PREFERENCE, BETA), policy, steps=steps, learning_rate=0.01)
    return policy.probabilities()


def ppo_from(start: Sequence[float], rewards: Sequence[float], steps: int) -> list[float]:
    """Where PPO ends that begins at `start`."""
    policy = Table.of_policy(start)
    setting = PPOSetting(steps=steps, learning_rate=0.05, critic_learning_rate=0.05, kl_coef=BETA)
    ppo = OneTokenPPO(setting, Table.of_policy(REFERENCE), torch.tensor([list(rewards)]), seed=0)
    ppo.train(policy, ConstantValue())
    return policy.probabilities()


def three_actions(descent_steps: int = 2000, ppo_steps: int = 200) -> dict[str, Any]:
    """All of it, as the report shows it."""
    rewards = {unseen: learned_reward(unseen, descent_steps) for unseen in (0.0, -3.0, 3.0)}
    reference = torch.tensor([REFERENCE])
    return {
        "beta": BETA,
        "dpo_losses": [{"policy": list(policy), "loss": loss_of(policy)} for policy in POLICIES],
        "ppo": [
            {
                "reward": reward,
                "optimum": tilted(reference, torch.tensor([reward]), BETA)[0].tolist(),
                "trained": ppo_from(REFERENCE, reward, ppo_steps),
            }
            for reward in rewards.values()
        ],
        "starts": [
            {
                "start": list(start),
                "dpo": dpo_from(start, descent_steps),
                "ppo": ppo_from(start, rewards[0.0], ppo_steps),
            }
            for start in STARTS
        ],
    }
