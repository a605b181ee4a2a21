"""One config for each critic-free method: what all of them share, and the section of its own.

It knows nothing of YAML, nor of how a run goes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

from pydantic import model_validator

from meshift.config.plan import PolicyPlan
from meshift.config.policy_sections import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GroupGenerationConfig,
    GRPOConfig,
    GSPOConfig,
    OnlineDPOConfig,
    PairGenerationConfig,
    PolicyActorConfig,
    PolicyConfig,
    RAFTConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
    UpdatesConfig,
)
from meshift.config.runs import OldLogprobs, RolloutRunConfig, TrainedOn


class CriticFreeRunConfig(RolloutRunConfig):
    """A method without a critic. `SECTION` names the section that holds its objective."""

    SECTION: ClassVar[str]
    actor: PolicyActorConfig
    plan: PolicyPlan = PolicyPlan()

    @property
    def objective(self) -> UpdatesConfig:
        """The method's own section."""
        return cast("UpdatesConfig", getattr(self, self.SECTION))

    @property
    def num_passes(self) -> int:
        """How often a step goes through its completions."""
        return self.objective.num_iterations

    @property
    def num_mini_batches(self) -> int:
        """Optimizer updates per pass."""
        return self.objective.num_mini_batches

    @property
    def has_reference(self) -> bool:
        """Whether a reference is held and read."""
        return bool(cast("Any", self.objective).kl_coef > 0)

    @property
    def compares_completions(self) -> bool:
        """Whether a completion's baseline comes from the others of its prompt."""
        return True

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        self._need_a_sequence_for_each_update(self.SECTION)
        if self.compares_completions and self.generation.num_generations < 2:
            raise ValueError(
                f"`generation.num_generations` = {self.generation.num_generations}, but completions of a prompt "
                "are compared with each other; set it to at least 2"
            )
        if not self.has_reference and (self.reference.sync_ref_model or self.reference.model_name_or_path):
            raise ValueError(
                f"`reference` is set, but no reference is read while `{self.SECTION}.kl_coef` is 0; raise it, or "
                "take the reference out"
            )
        return self


class PolicyRunConfig(CriticFreeRunConfig):
    """A method that moves the policy by advantages."""

    @property
    def policy(self) -> PolicyConfig:
        """The method's own section."""
        return cast("PolicyConfig", self.objective)

    @property
    def old_logprobs(self) -> OldLogprobs:
        """With one update in a step the trainer's are the `current` ones, if nothing reads them before that."""
        policy = self.policy
        if not policy.recompute_logprobs:
            return "sampled"
        is_paid = policy.importance_correction != "none" and policy.kl_in == "reward" and self.has_reference
        return "current" if self.num_passes * self.num_mini_batches == 1 and not is_paid else "recomputed"

    @property
    def ignores_staleness(self) -> bool:
        """Where ratios are against the trainer's log-probs, and nothing else weighs those of the sampler."""
        uncorrected = self.policy.recompute_logprobs and self.policy.importance_correction == "none"
        return self.max_staleness > 0 and uncorrected


class GroupRunConfig(PolicyRunConfig):
    """A method that draws several completions of each prompt."""

    generation: GroupGenerationConfig = GroupGenerationConfig()


class GRPORunConfig(GroupRunConfig):
    """`meshift grpo`: group relative policy optimisation."""

    SECTION: ClassVar[str] = "grpo"
    grpo: GRPOConfig = GRPOConfig()


class DrGRPORunConfig(GroupRunConfig):
    """`meshift dr-grpo`: GRPO without its two biases."""

    SECTION: ClassVar[str] = "dr_grpo"
    dr_grpo: DrGRPOConfig = DrGRPOConfig()


class DAPORunConfig(GroupRunConfig):
    """`meshift dapo`: decoupled clip and dynamic sampling."""

    SECTION: ClassVar[str] = "dapo"
    dapo: DAPOConfig = DAPOConfig()

    @model_validator(mode="after")
    def _buffer_fits(self) -> DAPORunConfig:
        length, limit = self.dapo.overlong_buffer_length, self.generation.max_completion_length
        if length is not None and length > limit:
            raise ValueError(
                f"`dapo.overlong_buffer_length` = {length} is more than `generation.max_completion_length` = "
                f"{limit}; lower it"
            )
        return self


class GSPORunConfig(GroupRunConfig):
    """`meshift gspo`: importance ratios of whole completions."""

    SECTION: ClassVar[str] = "gspo"
    gspo: GSPOConfig = GSPOConfig()


class CISPORunConfig(GroupRunConfig):
    """`meshift cispo`: clipped importance weights in place of a clipped objective."""

    SECTION: ClassVar[str] = "cispo"
    cispo: CISPOConfig = CISPOConfig()


class RLOORunConfig(GroupRunConfig):
    """`meshift rloo`: REINFORCE with the other completions of the prompt as baseline."""

    SECTION: ClassVar[str] = "rloo"
    rloo: RLOOConfig = RLOOConfig()


class ReinforcePPRunConfig(PolicyRunConfig):
    """`meshift reinforce++`: REINFORCE with advantages normalised over the whole step."""

    SECTION: ClassVar[str] = "reinforce_pp"
    reinforce_pp: ReinforcePPConfig = ReinforcePPConfig()

    @property
    def compares_completions(self) -> bool:
        """With `baseline: group` only."""
        return self.reinforce_pp.baseline == "group"


class ReMaxRunConfig(PolicyRunConfig):
    """`meshift remax`: REINFORCE with the greedy completion as baseline."""

    SECTION: ClassVar[str] = "remax"
    remax: ReMaxConfig = ReMaxConfig()

    @property
    def compares_completions(self) -> bool:
        """The baseline is the greedy completion."""
        return False


class OnlineDPORunConfig(CriticFreeRunConfig):
    """`meshift online-dpo`: DPO on pairs of the current policy's own completions."""

    SECTION: ClassVar[str] = "online_dpo"
    generation: PairGenerationConfig = PairGenerationConfig()
    online_dpo: OnlineDPOConfig = OnlineDPOConfig()

    @property
    def has_reference(self) -> bool:
        """DPO is nothing without."""
        return True

    @property
    def reference_moves(self) -> bool:
        """Rounds move it too."""
        return super().reference_moves or self.online_dpo.steps_per_round is not None

    @property
    def trained_on(self) -> TrainedOn:
        """Pairs, where no two scores are equal."""
        group = self.generation.num_generations
        per_prompt = 1 if self.online_dpo.pairs == "best_worst" else group * (group - 1) // 2
        return TrainedOn(units=self.data.batch_size * per_prompt, what="pairs", texts=2)

    @model_validator(mode="after")
    def _one_rule_for_the_reference(self) -> OnlineDPORunConfig:
        if self.online_dpo.steps_per_round is not None and self.reference.sync_ref_model:
            raise ValueError(
                "`online_dpo.steps_per_round` makes the reference the actor after every round, and "
                "`reference.sync_ref_model` moves it too; keep one of them"
            )
        return self


class RAFTRunConfig(CriticFreeRunConfig):
    """`meshift raft`: imitation of the best of several completions."""

    SECTION: ClassVar[str] = "raft"
    generation: GroupGenerationConfig = GroupGenerationConfig()
    raft: RAFTConfig = RAFTConfig()

    @property
    def trained_on(self) -> TrainedOn:
        """The best of each prompt, where all score enough."""
        return TrainedOn(units=self.data.batch_size * self.raft.num_kept, what="completions")

    @model_validator(mode="after")
    def _keeps_some_of_them(self) -> RAFTRunConfig:
        if self.raft.num_kept > self.generation.num_generations:
            raise ValueError(
                f"`raft.num_kept` = {self.raft.num_kept} is more than `generation.num_generations` = "
                f"{self.generation.num_generations}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _reads_one_reference(self) -> RAFTRunConfig:
        if self.max_staleness > 0 and self.has_reference and self.reference.sync_ref_model:
            raise ValueError(
                "RAFT reads the reference (`raft.kl_coef`) while completions are drawn, which is before "
                "`reference.sync_ref_model` has moved it for their step; take one of the three out"
            )
        return self
