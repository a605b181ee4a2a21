"""Meshift's losses on policies that answer a prompt with one token, without a language model.

A prompt is a number, a response is a number, and a model is any module that gives a number for each response to
each prompt: logits of a policy, or scores of a reward model. `DPOLoss`, `PairwiseLoss`, `PolicyLoss`, `ValueLoss`
and PPO's own advantages are those of `meshift.algorithms`; only the optimizer's loop is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshift.algorithms.losses import DPOLoss, PairwiseLoss, PolicyLoss, ValueLoss
from meshift.algorithms.ppo import PPO
from meshift.batch import Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.runs import PPORunConfig
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.training.engine import LossSums
from meshift.training.readings import TokenLogprobs

Watch = Callable[[int], None]
"""Called with the number of steps done, before the first and after each."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Preferences: response `chosen` [n] beat `rejected` [n] as an answer to `prompts` [n]; all int64."""

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


def logprobs_of(policy: nn.Module, prompts: Tensor, responses: Tensor) -> Tensor:
    """log p(response | prompt) [n]."""
    return torch.log_softmax(policy(prompts), -1).gather(1, responses[:, None])[:, 0]


def dpo_loss(policy: nn.Module, reference: nn.Module, pairs: Pairs, beta: float) -> Tensor:
    """`DPOLoss`, a mean over the pairs."""
    with torch.no_grad():
        given = {
            "ref_chosen_logps": Ragged.scalars(logprobs_of(reference, pairs.prompts, pairs.chosen)),
            "ref_rejected_logps": Ragged.scalars(logprobs_of(reference, pairs.prompts, pairs.rejected)),
        }
    read = {
        "chosen_logps": Ragged.scalars(logprobs_of(policy, pairs.prompts, pairs.chosen)),
        "rejected_logps": Ragged.scalars(logprobs_of(policy, pairs.prompts, pairs.rejected)),
    }
    loss, batch = DPOLoss(beta=beta), Batch(given)
    return loss(read, batch).total / loss.count(batch)


def reward_loss(scores: nn.Module, pairs: Pairs) -> Tensor:
    """`PairwiseLoss`, a mean over the pairs."""
    table = scores(pairs.prompts)
    read = {
        "chosen_scores": Ragged.scalars(table.gather(1, pairs.chosen[:, None])[:, 0]),
        "rejected_scores": Ragged.scalars(table.gather(1, pairs.rejected[:, None])[:, 0]),
    }
    loss, batch = PairwiseLoss(), Batch({"pair": Ragged.scalars(pairs.prompts)})
    return loss(read, batch).total / loss.count(batch)


def descend(
    loss: Callable[[], Tensor], model: nn.Module, *, steps: int, learning_rate: float, watch: Watch | None = None
) -> None:
    """Adam on the whole data set, in place."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step in range(steps):
        if watch is not None:
            watch(step)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    if watch is not None:
        watch(steps)


@dataclass(frozen=True, kw_only=True)
class PPOSetting:
    """The keys of PPO, with the paper's values (appendix A.2), but for the rates and the number of steps."""

    steps: int
    learning_rate: float
    critic_learning_rate: float
    num_rollouts: int = 512
    num_mini_batches: int = 4
    kl_coef: float = 0.1
    reward_clip: float = 20.0


class OneTokenPPO:
    """PPO on one-token answers: draws, advantages of `PPO`, updates by `PolicyLoss` and `ValueLoss`.

    `scores` [prompts, responses] is what the reward model says. The policy and the critic are trained in place.
    """

    def __init__(self, setting: PPOSetting, reference: nn.Module, scores: Tensor, seed: int) -> None:
        self.setting = setting
        self.reference = reference
        self.scores = scores
        self.draws = torch.Generator().manual_seed(seed)
        keys = {"kl_coef": setting.kl_coef, "reward_clip": setting.reward_clip, "num_ppo_epochs": 1}
        config = {"actor": {"model_name_or_path": "none"}, "data": {"dataset_name": "none"}, "ppo": keys}
        reward = {"functions": [{"function": "none:none"}]}
        self.method = PPO(
            make_config(PPORunConfig, {**config, "reward": reward, "output_dir": "none"}),
            SamplingTask(params=SamplingParams(max_new_tokens=1), seed=seed),
        )
        self.policy_loss = PolicyLoss(reading=TokenLogprobs(key="new_logprobs"))
        self.value_loss = ValueLoss()

    def train(self, policy: nn.Module, critic: nn.Module, watch: Watch | None = None) -> None:
        """Every step: rollouts for all prompts alike, then one update per mini-batch."""
        optimizers = (
            torch.optim.Adam(policy.parameters(), lr=self.setting.learning_rate),
            torch.optim.Adam(critic.parameters(), lr=self.setting.critic_learning_rate),
        )
        for step in range(self.setting.steps):
            if watch is not None:
                watch(step)
            for rows in self._mini_batches(self.rollouts(policy, critic)):
                losses = (self._policy_sums(policy, rows), self._value_sums(critic, rows))
                for optimizer, sums in zip(optimizers, losses, strict=True):
                    optimizer.zero_grad()
                    (sums.total / len(rows)).backward()
                    optimizer.step()
        if watch is not None:
            watch(self.setting.steps)

    @torch.no_grad()
    def rollouts(self, policy: nn.Module, critic: nn.Module) -> Batch:
        """A step's answers with their advantages and returns."""
        prompts = torch.arange(self.setting.num_rollouts) % len(self.scores)
        logprobs = torch.log_softmax(policy(prompts), -1)
        responses = torch.multinomial(logprobs.exp(), 1, generator=self.draws)[:, 0]
        values = critic(prompts)
        count = len(prompts)
        drawn = Batch(
            {
                "prompts": Ragged.scalars(prompts),
                "responses": Ragged.scalars(responses),
                "logprobs": Ragged.scalars(logprobs.gather(1, responses[:, None])[:, 0]),
                "ref_logprobs": Ragged.scalars(logprobs_of(self.reference, prompts, responses)),
                "model_scores": Ragged.scalars(self.scores[prompts, responses]),
                "truncated": Ragged.scalars(torch.zeros(count, dtype=torch.int64)),
                "values": Ragged(values.repeat_interleave(2), torch.full((count,), 2)),  # and one after the end
            }
        )
        return drawn.union(self.method.advantages(drawn).batch)

    def _mini_batches(self, drawn: Batch) -> Iterator[Batch]:
        order = torch.randperm(len(drawn), generator=self.draws)
        return (drawn.index(rows) for rows in order.chunk(self.setting.num_mini_batches))

    def _policy_sums(self, policy: nn.Module, rows: Batch) -> LossSums:
        new = logprobs_of(policy, rows["prompts"].values, rows["responses"].values)
        return self.policy_loss({"new_logprobs": Ragged.scalars(new)}, rows)

    def _value_sums(self, critic: nn.Module, rows: Batch) -> LossSums:
        values = critic(rows["prompts"].values).repeat_interleave(2)
        return self.value_loss({"new_values": Ragged(values, rows["values"].lengths)}, rows)


def tilted(reference: Tensor, scores: Tensor, kl_coef: float) -> Tensor:
    """The optimum of PPO's objective, reference * exp(scores / kl_coef) / Z [prompts, responses]: equation 8."""
    return torch.softmax(torch.log(reference) + scores / kl_coef, -1)
