"""What PPO has besides where completions have a cost that is to stay below a limit: a multiplier, a second critic.

Source: Dai et al. 2023 (Safe RLHF, arXiv 2310.12773), section 3.3 and appendix B. With cost limit l, mean cost C
of the step's completions and rate a, log lambda <- log lambda + a * lambda * (C - l), before the step's updates;
then A = (A_reward - lambda * A_cost) / (1 + lambda). KL is paid on both sides in full, so that its strength in A
is kl_coef whatever lambda is (the paper pays half of it on each). It knows nothing of where costs come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from meshift.algorithms.advantages import ValueNorm, explained_variance, gae, token_rewards
from meshift.algorithms.losses import ValueLoss
from meshift.algorithms.rollouts import RewardCall, infer_call, total_score
from meshift.batch import Batch, Outcome, Ragged
from meshift.config.runs import PPORunConfig
from meshift.graph.calls import Call, HostCall
from meshift.training.readings import SequenceScores, TokenValues


class Lagrangian:
    """The cost's side of PPO, and what it remembers: the multiplier and the statistics of the costs' returns."""

    def __init__(self, config: PPORunConfig) -> None:
        self.config = config
        self.log_multiplier = math.log(config.cost.multiplier_init)
        self.value_norm = ValueNorm(config.ppo.value_norm, config.ppo.value_norm_beta)

    @property
    def multiplier(self) -> float:
        """lambda."""
        return math.exp(self.log_multiplier)

    def calls(self, functions: RewardCall | None, columns: tuple[str, ...]) -> tuple[Call, ...]:
        """What a completion costs, by model, by functions or by both, and what the cost critic expected."""
        calls: list[Call] = []
        if self.config.cost.model_name_or_path is not None:
            scoring = SequenceScores(key="cost_model_scores")
            calls.append(infer_call("cost", "cost", scoring, ("tokens",), "cost_model_scores"))
        if functions is not None:
            reads = ("tokens", "completion_lengths", *columns)
            calls.append(
                HostCall(
                    name="cost_functions",
                    function=_OfCosts(functions),
                    reads=reads,
                    writes=("cost_function_scores",),
                )
            )
        reading = TokenValues(key="cost_values")
        read = ("tokens", "completion_lengths")
        return (*calls, infer_call("cost_values", "cost_critic", reading, read, "cost_values"))

    def loss(self) -> ValueLoss:
        """The cost critic's."""
        return ValueLoss(
            cliprange_value=self.config.ppo.cliprange_value,
            values="cost_values",
            returns="cost_returns",
            name="cost_critic",
        )

    def weigh(self, batch: Batch, advantages: Ragged, kl: Ragged, kl_coef: float) -> tuple[Ragged, Outcome]:
        """The advantages of rewards, with those of costs taken off; `cost_returns` and metrics.

        A completion that was cut off costs what it says so far, and nothing after: its cost is not waited for.
        """
        cost, ppo = self.config.cost, self.config.ppo
        given, judged = total_score(batch, cost.weight, "cost_")
        self._update(float(given[judged].double().mean()) if bool(judged.any()) else cost.limit)
        costs = token_rewards(kl, -kl_coef, given.clamp(-ppo.reward_clip, ppo.reward_clip), judged)
        raw = batch["cost_values"]
        values = self.value_norm.denormalise(raw.values).clone()  # not the batch's own
        values[raw.starts + raw.lengths - 1] = 0.0
        cost_advantages, returns = gae(costs, Ragged(values, raw.lengths), ppo.gamma, ppo.lam)
        self.value_norm.update(returns.values)
        weight = self.multiplier
        combined = (advantages.values - weight * cost_advantages.values) / (1.0 + weight)
        expected = Ragged(values, raw.lengths).drop_last().values
        metrics = {
            "cost/mean": float(given[judged].mean()) if bool(judged.any()) else math.nan,
            "cost/over_limit_fraction": float((given[judged] > cost.limit).float().mean()),
            "cost/multiplier": weight,
            "cost_critic/values/mean": float(expected.mean()),
            "cost_critic/returns/mean": float(returns.values.mean()),
            "cost_critic/vf_explained_var": explained_variance(expected, returns.values),
        }
        written = {"cost_returns": Ragged(self.value_norm.normalise(returns.values), returns.lengths)}
        found = {key: value for key, value in metrics.items() if not math.isnan(value)}
        return Ragged(combined, advantages.lengths), Outcome(batch=Batch(written), metrics=found)

    def _update(self, mean_cost: float) -> None:
        cost = self.config.cost
        raised = self.log_multiplier + cost.multiplier_learning_rate * self.multiplier * (mean_cost - cost.limit)
        self.log_multiplier = min(raised, math.log(cost.multiplier_max))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"log_multiplier": self.log_multiplier, "value_norm": self.value_norm.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.log_multiplier = state["log_multiplier"]
        self.value_norm.load_state_dict(state["value_norm"])


class _OfCosts:
    """Reward functions that say what completions cost: under other names than those of rewards."""

    def __init__(self, functions: RewardCall) -> None:
        self.functions = functions

    def __call__(self, batch: Batch) -> Outcome:
        """Write `cost_function_scores` [1]; metrics `cost/<function>` and `perf/time_per_cost/<function>`."""
        outcome = self.functions(batch)
        metrics = {_of_costs(key): value for key, value in outcome.metrics.items()}
        scores = {"cost_function_scores": outcome.batch["function_scores"]} if outcome.batch.fields else {}
        return Outcome(batch=Batch(scores), metrics=metrics)


def _of_costs(metric: str) -> str:
    """A metric of reward functions under a cost's name."""
    if metric.startswith("reward/"):
        return metric.replace("reward/", "cost/", 1)
    return metric.replace("time_per_reward/", "time_per_cost/", 1)
