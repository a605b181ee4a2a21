"""One config for each critic-free method: what all of them share, and the section of its own.

It knows nothing of YAML, nor of how a run goes.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from meshift.config.plan import PolicyPlan
from meshift.config.policy_sections import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GroupGenerationConfig,
    GRPOConfig,
    GSPOConfig,
    PolicyActorConfig,
    PolicyConfig,
    ReinforcePPConfig,
    ReMaxConfig,
    RLOOConfig,
)
from meshift.config.runs import RolloutRunConfig


class PolicyRunConfig(RolloutRunConfig):
    """A method without a critic. `SECTION` names the section that holds its objective."""

    SECTION: ClassVar[str]
    actor: PolicyActorConfig
    plan: PolicyPlan = PolicyPlan()

    @property
    def policy(self) -> PolicyConfig:
        """The method's own section."""
        section: PolicyConfig = getattr(self, self.SECTION)
        return section

    @property
    def num_passes(self) -> int:
        """How often a step goes through its completions."""
        return self.policy.num_iterations

    @property
    def num_mini_batches(self) -> int:
        """Optimizer updates per pass."""
        return self.policy.num_mini_batches

    @property
    def has_reference(self) -> bool:
        """Whether a reference is held and read."""
        return self.policy.kl_coef > 0

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
