"""PPO with a critic, a reference and a reward: the whole method as one graph of calls.

Source: "Is DPO Superior to PPO for LLM Alignment?" (Xu et al. 2024), whose three keys are one config line each:
`data.batch_size` (a large batch), `ppo.whiten_advantages`, and `reference.sync_ref_model` (EMA reference).
It knows nothing of devices, of how texts are sampled, or of where rewards come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from meshift.algorithms.advantages import (
    KLController,
    ValueNorm,
    explained_variance,
    gae,
    kl_estimate,
    token_rewards,
    whiten,
)
from meshift.algorithms.lagrangian import Lagrangian
from meshift.algorithms.losses import PolicyAndValueLoss, PolicyLoss, ValueLoss
from meshift.algorithms.off_policy import correction_of, paid_logprobs
from meshift.algorithms.rollouts import (
    ROLLOUT_INPUTS,
    RewardCall,
    infer_call,
    length_metrics,
    require_numbers,
    rollout_call,
    rollout_keys,
    score_metrics,
    scoring_calls,
    sync_calls,
    total_score,
)
from meshift.batch import WHERE, Batch, Outcome, Ragged
from meshift.config.runs import PPORunConfig
from meshift.generation.rollout import SamplingTask
from meshift.graph.calls import Call, Graph, HostCall, ModelCall
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs, TokenValues


class PPO:
    """The method and what it remembers between steps: the KL coefficient and the returns' statistics."""

    def __init__(self, config: PPORunConfig, sampling: SamplingTask) -> None:
        self.config = config
        self.sampling = sampling
        ppo = config.ppo
        self.kl = KLController(ppo.kl_coef, ppo.adaptive_kl, ppo.kl_target, ppo.kl_horizon)
        self.value_norm = ValueNorm(ppo.value_norm, ppo.value_norm_beta)
        self.lagrangian = Lagrangian(config) if config.cost.is_given else None

    def graph(
        self,
        reward_functions: RewardCall | None = None,
        columns: tuple[str, ...] = (),
        cost_functions: RewardCall | None = None,
    ) -> Graph:
        """The calls of a step. Functions read tokens and the named `columns`, and write one score a row."""
        costs = self.lagrangian.calls(cost_functions, columns) if self.lagrangian is not None else ()
        cost_keys = tuple(key for call in costs for key in call.writes)
        rollout = rollout_keys(self.sampling)
        scoring = scoring_calls(self.config.reward, reward_functions, columns)
        score_keys = tuple(key for call in scoring for key in call.writes)
        recomputing = self._recomputing(rollout)
        old = tuple(key for call in recomputing for key in call.writes)
        paid = old if correction_of(self.config.ppo) is not None else ()
        estimates, place = ("values", "logprobs", "ref_logprobs"), tuple(key for key in columns if key == WHERE)
        calls: tuple[Call, ...] = (
            rollout_call(self.sampling),
            *scoring,
            infer_call("reference", "reference", self._reading("ref_logprobs"), rollout, "ref_logprobs"),
            *recomputing,
            infer_call("values", self._critic, TokenValues(), ("tokens", "completion_lengths"), "values"),
            *costs,
            HostCall(
                name="advantages",
                function=self.advantages,
                reads=(*score_keys, *cost_keys, *estimates, *paid, "truncated", *place),
                writes=("scores", "advantages", "returns", *(("cost_returns",) if costs else ())),
            ),
            *self._training((*rollout, "logprobs", *old, "advantages", "versions")),
            *self._cost_training(),
            *sync_calls(self.config.reference),
        )
        return Graph(calls, frozenset((*ROLLOUT_INPUTS, *columns)))

    def advantages(self, batch: Batch) -> Outcome:
        """Scores and KL to rewards per token, to advantages and normalised returns, over the whole batch."""
        ppo = self.config.ppo
        scores, judged = total_score(batch, self.config.reward.weight)
        truncated = batch["truncated"].values.bool() & (not ppo.length_limit_is_end)
        process = self._process_rewards(batch)
        outcome = scores if process is None else scores - process.sum_rows()
        rewarded, scored = self._truncation_rule(outcome.clamp(-ppo.reward_clip, ppo.reward_clip), truncated)
        scored = scored & judged
        logprobs, ref_logprobs = batch["logprobs"], batch["ref_logprobs"]
        penalty = kl_estimate(paid_logprobs(batch).values, ref_logprobs.values, ppo.kl_estimator)
        require_numbers(Ragged(penalty, logprobs.lengths).sum_rows(), batch, "KL to the reference")
        rewards = token_rewards(Ragged(penalty, logprobs.lengths), self.kl.coef, rewarded, scored)
        if process is not None:
            paid = process.values.clamp(-ppo.reward_clip, ppo.reward_clip)
            rewards = Ragged(rewards.values + paid, rewards.lengths)
            rewarded = rewarded + Ragged(paid, rewards.lengths).sum_rows()
        values = self._values(batch["values"], truncated | ~judged)
        advantages, returns = gae(rewards, values, ppo.gamma, ppo.lam)
        self.value_norm.update(returns.values)
        kl = Ragged(logprobs.values - ref_logprobs.values, logprobs.lengths).sum_rows()
        metrics = {
            **score_metrics(batch, scores[judged]),
            "objective/kl": float(kl.mean()),
            "objective/kl_coef": self.kl.coef,
            "objective/rlhf_reward": float((rewarded * scored).mean() - self.kl.coef * kl.mean()),
            "objective/no_score_fraction": float((~scored).float().mean()),
            **length_metrics(logprobs.lengths, batch["truncated"].values),
            "critic/values/mean": float(values.drop_last().values.mean()),
            "critic/returns/mean": float(returns.values.mean()),
            "critic/advantages/mean": float(advantages.values.mean()),
            "critic/vf_explained_var": explained_variance(values.drop_last().values, returns.values),
        }
        kl_coef = self.kl.coef
        self.kl.update(self._controlled_kl(kl, logprobs.lengths), len(batch))
        weighed = Outcome()
        if self.lagrangian is not None:
            kl_paid = Ragged(penalty, logprobs.lengths)
            advantages, weighed = self.lagrangian.weigh(batch, advantages, kl_paid, kl_coef)
        final = whiten(advantages.values) if ppo.whiten_advantages else advantages.values
        written = {
            "scores": Ragged.scalars(scores),
            "advantages": Ragged(final, advantages.lengths),
            "returns": Ragged(self.value_norm.normalise(returns.values), returns.lengths),
        }
        return Outcome(batch=Batch(written).union(weighed.batch), metrics={**metrics, **weighed.metrics})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = {"kl": self.kl.state_dict(), "value_norm": self.value_norm.state_dict()}
        return kept if self.lagrangian is None else {**kept, "lagrangian": self.lagrangian.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.kl.load_state_dict(state["kl"])
        self.value_norm.load_state_dict(state["value_norm"])
        if self.lagrangian is not None:
            self.lagrangian.load_state_dict(state["lagrangian"])

    def _process_rewards(self, batch: Batch) -> Ragged | None:
        """What the reward model pays at every token, where it does; also where a completion is cut off."""
        if "process_scores" not in batch:
            return None
        given = batch["process_scores"]
        return Ragged(self.config.reward.weight * given.values, given.lengths)

    def _truncation_rule(self, scores: Tensor, truncated: Tensor) -> tuple[Tensor, Tensor]:
        penalty = self.config.ppo.missing_eos_penalty
        if penalty is None:
            return scores, ~truncated
        return torch.where(truncated, scores - penalty, scores), torch.ones_like(truncated)

    def _values(self, raw: Ragged, open_ended: Tensor) -> Ragged:
        values = self.value_norm.denormalise(raw.values).clone()  # not the batch's own
        last = raw.starts + raw.lengths - 1
        values[last[~open_ended]] = 0.0  # nothing comes after an end
        return Ragged(values, raw.lengths)

    def _controlled_kl(self, kl: Tensor, lengths: Tensor) -> float:
        if self.config.ppo.kl_target_unit == "sequence":
            return float(kl.mean())
        return float(kl.sum() / lengths.sum())

    def _reading(self, key: str, *, entropy: bool = False) -> TokenLogprobs:
        return TokenLogprobs(
            key=key,
            temperature=self.config.generation.temperature,
            with_entropy=entropy,
            entropy_gradient=self.config.ppo.entropy_coef > 0,
            stop_token_ids=self.sampling.params.stop_token_ids,
        )

    def _policy_loss(self) -> PolicyLoss:
        ppo = self.config.ppo
        return PolicyLoss(
            reading=self._reading("new_logprobs", entropy=True),
            clip_ratio_low=ppo.clip_ratio_low,
            clip_ratio_high=ppo.clip_ratio_high,
            dual_clip=ppo.dual_clip,
            entropy_coef=ppo.entropy_coef,
            max_importance_ratio=ppo.max_importance_ratio,
            max_update_kl=ppo.max_update_kl,
            old=self.config.old_logprobs,
            correction=correction_of(ppo),
        )

    @property
    def _critic(self) -> str:
        """The role that values are of."""
        return "actor" if self.config.ppo.shared_trunk else "critic"

    def _training(self, reads: tuple[str, ...]) -> tuple[ModelCall, ...]:
        """Of the actor, which reads these keys, and of the critic: in one call where they share a trunk."""
        policy, value = self._policy_loss(), ValueLoss(cliprange_value=self.config.ppo.cliprange_value)
        shared = self.config.ppo.shared_trunk
        both = PolicyAndValueLoss(policy=policy, value=value, vf_coef=self.config.ppo.vf_coef)
        task = replace(self._task(both if shared else policy), max_staleness=self.config.max_staleness)
        taught = ("values", "returns")
        own = (*reads, *taught) if shared else reads
        actor = ModelCall(name="train_actor", role="actor", kind="train", task=task, reads=own)
        if shared:
            return (actor,)
        reads = ("tokens", "completion_lengths", *taught)
        return actor, ModelCall(
            name="train_critic", role="critic", kind="train", task=self._task(value), reads=reads
        )

    def _recomputing(self, rollout: tuple[str, ...]) -> tuple[ModelCall, ...]:
        """The actor reads its own completions before the updates, where ratios are to be against that."""
        if self.config.old_logprobs != "recomputed":
            return ()
        return (infer_call("old_logprobs", "actor", self._reading("old_logprobs"), rollout, "old_logprobs"),)

    def _cost_training(self) -> tuple[ModelCall, ...]:
        if self.lagrangian is None:
            return ()
        loss = self.lagrangian.loss()
        reads = ("tokens", "completion_lengths", loss.values, loss.returns)
        task = self._task(loss)
        return (ModelCall(name="train_cost_critic", role="cost_critic", kind="train", task=task, reads=reads),)

    def _task(self, loss: PolicyLoss | ValueLoss | PolicyAndValueLoss) -> TrainTask:
        ppo = self.config.ppo
        return TrainTask(loss=loss, num_epochs=ppo.num_ppo_epochs, num_mini_batches=ppo.num_mini_batches)
