"""One config per command, and the rules that hold between its sections.

It knows nothing of YAML, nor of how a run goes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from meshift.config.section import Section
from meshift.config.sections import (
    CriticConfig,
    DataConfig,
    DType,
    GenerationConfig,
    PairDataConfig,
    PPOConfig,
    PromptDataConfig,
    ReferenceConfig,
    RewardConfig,
    TrainableConfig,
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
    report_to: list[Literal["tensorboard"]] = Field(["tensorboard"], description="besides metrics.jsonl")
    num_logged_samples: int = Field(8, ge=0, description="completions per step written to samples.jsonl")
    data: DataConfig


class PPORunConfig(RunConfig):
    """`meshift ppo`: PPO with a critic, a reference and a reward."""

    data: PromptDataConfig
    actor: TrainableConfig
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig = RewardConfig()
    generation: GenerationConfig = GenerationConfig()
    ppo: PPOConfig = PPOConfig()

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> PPORunConfig:
        if self.actor.model_name_or_path is None:
            raise ValueError("`actor.model_name_or_path` is needed")
        if self.reward.model_name_or_path is None and not self.reward.functions:
            raise ValueError("a reward is needed: `reward.model_name_or_path`, `reward.functions`, or both")
        sequences = self.data.batch_size * self.generation.num_generations
        if sequences < self.ppo.num_mini_batches:
            raise ValueError(
                f"`ppo.num_mini_batches` = {self.ppo.num_mini_batches} is more than a step's {sequences} sequences"
            )
        return self


class RewardRunConfig(RunConfig):
    """`meshift reward`: a Bradley-Terry reward model from preference pairs."""

    data: PairDataConfig
    model: TrainableConfig
    eval_steps: int | None = Field(None, ge=1, description="steps between held-out evaluations (null: at the end)")

    @model_validator(mode="after")
    def _has_model(self) -> RewardRunConfig:
        if self.model.model_name_or_path is None:
            raise ValueError("`model.model_name_or_path` is needed")
        return self
