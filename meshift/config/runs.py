"""One config per command, and the rules that hold between its sections.

It knows nothing of YAML, nor of how a run goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from meshift.config.plan import ActorPlan, DPOPlan, LaunchConfig, PlanConfig, PPOPlan, RewardPlan
from meshift.config.section import Section
from meshift.config.sections import (
    CostConfig,
    CriticConfig,
    DataConfig,
    DemonstrationDataConfig,
    DPOActorConfig,
    DPOConfig,
    DType,
    GenerationConfig,
    HeldOutDataConfig,
    KTOConfig,
    ORPOConfig,
    PairDataConfig,
    PPOConfig,
    PPORewardConfig,
    PromptDataConfig,
    ReferenceConfig,
    RewardConfig,
    RewardFunctionConfig,
    RewardLossConfig,
    ScoringModelConfig,
    SFTModelConfig,
    SimPOConfig,
    TrainableConfig,
    UnpairedDataConfig,
)


class RunConfig(Section):
    """Keys that every command shares."""

    output_dir: str = Field(description="the run's folder")
    overwrite_output_dir: bool = Field(False, description="delete an earlier run that the folder holds")
    seed: int = Field(0, ge=0, description="of data order, sampling and new weights")
    dtype: DType = Field("auto", description="compute type; auto: bfloat16 where the hardware has it")
    num_threads: int | None = Field(None, ge=1, description="CPU threads (null: all cores)")
    max_steps: int | None = Field(None, ge=1, description="steps of the run (null: from num_train_epochs)")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data, where max_steps is null")
    save_steps: int | None = Field(None, ge=1, description="steps between two checkpoints (null: only `final/`)")
    save_total_limit: int | None = Field(2, ge=1, description="checkpoints kept, the newest (null: all)")
    resume: bool = Field(False, description="go on from the last whole checkpoint in output_dir (`--resume`)")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="besides metrics.jsonl")
    data: DataConfig
    plan: PlanConfig = PlanConfig()
    launch: LaunchConfig = LaunchConfig()

    @field_validator("report_to")
    @classmethod
    def _is_installed(cls, names: list[str]) -> list[str]:
        if "wandb" in names and find_spec("wandb") is None:
            raise ValueError("wandb is not installed; run pip install 'meshift[wandb]', or take it out")
        return names


OldLogprobs = Literal["sampled", "recomputed", "current"]


class TrainedOn(NamedTuple):
    """What a step trains on at most: so many units of `what`, each of so many texts."""

    units: int
    what: str
    texts: int = 1


class RolloutRunConfig(RunConfig, ABC):
    """A run that samples completions of prompts and is told what they are worth."""

    data: PromptDataConfig
    actor: TrainableConfig
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig = RewardConfig()
    generation: GenerationConfig = GenerationConfig()
    max_staleness: int = Field(
        0, ge=0, description="steps whose updates the weights that draw a step's completions lack (0: none)"
    )
    num_logged_samples: int = Field(8, ge=0, description="completions per step written to samples.jsonl")
    num_report_prompts: int = Field(
        4, ge=0, description="prompts that are completed again through the run, for the report (0: none)"
    )
    report_samples_every: int | None = Field(
        None, ge=1, description="steps between two such completions (null: first, last and a few between)"
    )

    @property
    def num_sequences(self) -> int:
        """Completions that a step draws."""
        return self.data.batch_size * self.generation.num_generations

    @property
    def trained_on(self) -> TrainedOn:
        """What a step trains on: its completions, if not a choice of them."""
        return TrainedOn(units=self.num_sequences, what="sequences")

    @property
    def reference_moves(self) -> bool:
        """Whether the actor's weights come into the reference."""
        return self.reference.sync_ref_model

    @property
    def cost_functions(self) -> list[RewardFunctionConfig]:
        """Functions that give costs, of a method that knows such."""
        return []

    @property
    def old_logprobs(self) -> OldLogprobs:
        """Whose log-probs ratios are against: the sampler's, or the trainer's, read once more or not."""
        return "sampled"

    @property
    def ignores_staleness(self) -> bool:
        """Whether tokens that older weights drew are trained on as if the current ones had drawn them."""
        return False

    @property
    @abstractmethod
    def num_passes(self) -> int:
        """How often a step goes through its completions."""

    @property
    @abstractmethod
    def num_mini_batches(self) -> int:
        """Optimizer updates per pass."""

    @model_validator(mode="after")
    def _has_actor_and_reward(self) -> Self:
        _need_model("actor", self.actor)
        _need_whole_weights(self.actor, self.plan, moves=self.reference_moves)
        if self.reward.model_name_or_path is None and not self.reward.functions:
            raise ValueError("a reward is needed: `reward.model_name_or_path`, `reward.functions`, or both")
        return self

    def _need_a_sequence_for_each_update(self, section: str) -> None:
        count, what, _ = self.trained_on
        if count < self.num_mini_batches:
            raise ValueError(
                f"`{section}.num_mini_batches` = {self.num_mini_batches} is more than a step's {count} {what}"
            )


class PPORunConfig(RolloutRunConfig):
    """`meshift ppo`: PPO with a critic, a reference and a reward; if given, with a cost and a critic of that."""

    reward: PPORewardConfig = PPORewardConfig()
    critic: CriticConfig = CriticConfig()
    cost: CostConfig = CostConfig()
    cost_critic: CriticConfig = CriticConfig()
    ppo: PPOConfig = PPOConfig()
    plan: PPOPlan = PPOPlan()

    @property
    def num_passes(self) -> int:
        """How often a step goes through its completions."""
        return self.ppo.num_ppo_epochs

    @property
    def num_mini_batches(self) -> int:
        """Optimizer updates per pass."""
        return self.ppo.num_mini_batches

    @property
    def old_logprobs(self) -> OldLogprobs:
        """The sampler's, or the actor's before a step's updates."""
        return "recomputed" if self.ppo.recompute_logprobs else "sampled"

    @property
    def ignores_staleness(self) -> bool:
        """Where ratios are against the trainer's log-probs, and nothing else weighs those of the sampler."""
        uncorrected = self.ppo.recompute_logprobs and self.ppo.importance_correction == "none"
        return self.max_staleness > 0 and uncorrected

    @model_validator(mode="after")
    def _has_sequences_enough(self) -> PPORunConfig:
        self._need_a_sequence_for_each_update("ppo")
        return self

    @model_validator(mode="after")
    def _has_one_critic(self) -> PPORunConfig:
        if self.ppo.shared_trunk and self.critic != CriticConfig():
            raise ValueError(
                "`critic` is set, but with `ppo.shared_trunk` it is a head of the actor's model, and trained as "
                "`actor` says; take one of them out (critic=null on the command line)"
            )
        return self

    @model_validator(mode="after")
    def _has_a_cost_for_its_critic(self) -> PPORunConfig:
        if not self.cost.is_given and (self.cost != CostConfig() or self.cost_critic != CriticConfig()):
            raise ValueError(
                "`cost` or `cost_critic` is set, but nothing says what a completion costs: set "
                "`cost.model_name_or_path`, `cost.functions`, or both"
            )
        if self.cost.multiplier_init > self.cost.multiplier_max:
            raise ValueError("`cost.multiplier_init` is above `cost.multiplier_max`; lower it")
        return self

    @property
    def cost_functions(self) -> list[RewardFunctionConfig]:
        """Functions that give costs."""
        return self.cost.functions


class HeldOutRunConfig(RunConfig):
    """A run on given rows, which may be measured on others."""

    NOT_HERE: ClassVar[Mapping[str, str]] = MappingProxyType(
        dict.fromkeys(
            ("max_staleness", "num_logged_samples", "num_report_prompts", "report_samples_every"),
            "is of methods that draw completions, and this one learns from given rows",
        )
    )

    eval_steps: int | None = Field(None, ge=1, description="steps between held-out evaluations (null: at the end)")
    data: HeldOutDataConfig

    @model_validator(mode="after")
    def _has_rows_to_evaluate_on(self) -> Self:
        if self.eval_steps is not None and self.data.eval_dataset_name is None:
            raise ValueError("`eval_steps` is set without `data.eval_dataset_name`; name held-out rows")
        return self


class SFTRunConfig(HeldOutRunConfig):
    """`meshift sft`: supervised fine-tuning on demonstrations."""

    data: DemonstrationDataConfig
    model: SFTModelConfig
    plan: ActorPlan = ActorPlan()

    @model_validator(mode="after")
    def _has_model(self) -> SFTRunConfig:
        _need_model("model", self.model)
        return self


class RewardRunConfig(HeldOutRunConfig):
    """`meshift reward`: a Bradley-Terry reward model from preference pairs."""

    data: PairDataConfig
    model: ScoringModelConfig
    reward: RewardLossConfig = RewardLossConfig()
    plan: RewardPlan = RewardPlan()

    @model_validator(mode="after")
    def _has_model(self) -> RewardRunConfig:
        _need_model("model", self.model)
        return self


class DPORunConfig(HeldOutRunConfig):
    """`meshift dpo`: direct preference optimisation, with a reference and without sampling."""

    data: PairDataConfig
    actor: DPOActorConfig
    reference: ReferenceConfig = ReferenceConfig()
    dpo: DPOConfig = DPOConfig()
    plan: DPOPlan = DPOPlan()

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> DPORunConfig:
        _need_model("actor", self.actor)
        _need_whole_weights(self.actor, self.plan, moves=self.reference.sync_ref_model)
        if self.dpo.precompute_ref_log_probs and self.reference.sync_ref_model:
            raise ValueError(
                "`dpo.precompute_ref_log_probs` is for a reference that stands still, and "
                "`reference.sync_ref_model` moves it; set one of them to false"
            )
        return self


class KTORunConfig(HeldOutRunConfig):
    """`meshift kto`: completions that were liked or not, without pairs."""

    data: UnpairedDataConfig
    actor: DPOActorConfig
    reference: ReferenceConfig = ReferenceConfig()
    kto: KTOConfig = KTOConfig()
    plan: DPOPlan = DPOPlan()

    @model_validator(mode="after")
    def _has_model(self) -> KTORunConfig:
        _need_model("actor", self.actor)
        _need_whole_weights(self.actor, self.plan, moves=self.reference.sync_ref_model)
        return self


class ReferenceFreeRunConfig(HeldOutRunConfig):
    """A run on preference pairs without a reference."""

    data: PairDataConfig
    actor: DPOActorConfig
    plan: ActorPlan = ActorPlan()

    @model_validator(mode="after")
    def _has_model(self) -> Self:
        _need_model("actor", self.actor)
        return self


class ORPORunConfig(ReferenceFreeRunConfig):
    """`meshift orpo`: likelihood of the chosen text and the odds ratio of both."""

    orpo: ORPOConfig = ORPOConfig()


class SimPORunConfig(ReferenceFreeRunConfig):
    """`meshift simpo`: mean log-probs of both texts, a margin apart."""

    simpo: SimPOConfig = SimPOConfig()


def _need_model(section: str, model: TrainableConfig) -> None:
    if model.model_name_or_path is None:
        raise ValueError(f"`{section}.model_name_or_path` is needed")


def _need_whole_weights(actor: TrainableConfig, plan: PlanConfig, *, moves: bool) -> None:
    if not moves or actor.lora is None:
        return
    given = {} if "actor" not in plan.roles else plan.roles["actor"].placements
    home = given.get("train") or next(iter(given.values()), None)
    if home is not None and home.layout.endswith("s"):
        raise ValueError(
            f"the reference follows whole matrices, and in {home.layout} of `plan.actor` ranks have rows of "
            "adapters; take out the `s` or `actor.lora`, or let the reference stand still"
        )
