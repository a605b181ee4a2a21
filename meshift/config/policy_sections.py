"""The objectives of the critic-free methods: what all of them have, and one group of keys for each.

Defaults are those of the method's paper, which the docstring names. It knows nothing of how the keys are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from meshift.config.section import Off, Section
from meshift.config.sections import (
    IDLE_CAP,
    GenerationConfig,
    ImportanceCap,
    ImportanceCorrection,
    TrainableConfig,
    need_recomputed,
)

Aggregation = Literal["token", "sequence", "constant"]
Estimator = Literal["k1", "k2", "k3"]

# Keys whose default differs between methods, described once.
LossAggregation = Annotated[
    Aggregation,
    Field(
        description="the loss is a mean over tokens; over completions of their token means; or a sum over tokens, "
        "divided by completions x max_completion_length"
    ),
]
NumMiniBatches = Annotated[int, Field(ge=1, description="optimizer updates per pass")]
ClipLow = Annotated[
    float, Field(gt=0, le=1, description="importance ratio is clipped at 1 - this (1: there is no lower bound)")
]
ClipHigh = Annotated[float, Field(gt=0, description="importance ratio is clipped at 1 + this")]
KLCoef = Annotated[
    float, Field(ge=0, description="strength of the pull to the reference (0: no reference is loaded)")
]
KLPlace = Annotated[Literal["loss", "reward"], Field(description="where KL to the reference is paid")]
KLEstimator = Annotated[Estimator, Field(description="estimator of KL to the reference")]
RecomputeLogprobs = Annotated[
    bool,
    Field(
        description="importance ratios are against the trainer's log-probs before the step's updates, for one "
        "more forward pass if there are several (false: against the sampler's)"
    ),
]
RewardScale = Annotated[
    Literal["group", "batch", "none"],
    Field(description="centred scores are divided by the std of their group, of the whole step, or not"),
]


class PolicyActorConfig(TrainableConfig):
    """The model that a critic-free method trains."""

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")


class GroupGenerationConfig(GenerationConfig):
    """Several completions per prompt, each other's baseline."""

    num_generations: int = Field(8, ge=1, description="completions per prompt")


class PairGenerationConfig(GenerationConfig):
    """Completions of a prompt that are held against each other in pairs."""

    num_generations: int = Field(2, ge=1, description="completions per prompt")


class UpdatesConfig(Section):
    """How often and in how many parts a step's completions are gone through."""

    num_iterations: int = Field(1, ge=1, description="passes over each step's completions")
    num_mini_batches: NumMiniBatches = 1


class PolicyConfig(UpdatesConfig):
    """What every critic-free objective has."""

    IDLE: ClassVar[Mapping[str, Off]] = IDLE_CAP

    clip_ratio_low: ClipLow = 0.2
    clip_ratio_high: ClipHigh = 0.2
    dual_clip: float | None = Field(
        None, gt=1, description="upper bound of the loss, -A * this, where the advantage is negative"
    )
    loss_aggregation: LossAggregation = "token"
    kl_coef: KLCoef = 0.0
    kl_in: KLPlace = "loss"
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = Field(0.0, ge=0, description="bonus for entropy in the loss")
    reward_clip: float | None = Field(
        None, gt=0, description="scores are clipped to plus or minus this (null: they are not)"
    )
    missing_eos_penalty: float | None = Field(
        None, description="taken off the score of a completion that ran into the length limit"
    )
    mask_truncated_completions: bool = Field(
        False, description="do not train on completions that ran into the length limit"
    )
    recompute_logprobs: RecomputeLogprobs = False
    importance_correction: ImportanceCorrection = "none"
    importance_cap: ImportanceCap = 2.0
    max_importance_ratio: float | None = Field(
        None, gt=1, description="mean importance ratio that ends a step's updates early"
    )
    max_update_kl: float | None = Field(None, gt=0, description="policy KL per token that ends them early")

    @model_validator(mode="after")
    def _one_rule_for_truncation(self) -> PolicyConfig:
        if self.mask_truncated_completions and self.missing_eos_penalty is not None:
            raise ValueError(
                "mask_truncated_completions and missing_eos_penalty exclude each other; keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _has_what_it_weighs(self) -> PolicyConfig:
        need_recomputed(self.importance_correction, recompute=self.recompute_logprobs)
        return self


class GRPOConfig(PolicyConfig):
    """Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1."""

    loss_aggregation: LossAggregation = "sequence"
    kl_coef: KLCoef = 0.04
    scale_rewards: RewardScale = "group"


class DrGRPOConfig(PolicyConfig):
    """Liu et al. 2025 (Understanding R1-Zero-like training, arXiv 2503.20783), section 3."""

    loss_aggregation: LossAggregation = "constant"


class DAPOConfig(PolicyConfig):
    """Yu et al. 2025 (DAPO, arXiv 2503.14476), section 3."""

    IDLE: ClassVar[Mapping[str, Off]] = MappingProxyType(
        {
            **IDLE_CAP,
            "max_sampling_rounds": Off("dynamic_sampling", (False,)),
            "overlong_penalty": Off("overlong_buffer_length", (0,)),
        }
    )

    num_mini_batches: NumMiniBatches = 4
    clip_ratio_high: ClipHigh = 0.28
    scale_rewards: RewardScale = "group"
    dynamic_sampling: bool = Field(
        True, description="draw further prompts in place of those whose completions all have the same score"
    )
    max_sampling_rounds: int = Field(10, ge=1, description="rounds of drawing in a step, the first included")
    overlong_buffer_length: int | None = Field(
        None,
        ge=0,
        description="completions that reach into the last this many tokens pay for it (null: a fifth of "
        "max_completion_length; 0: none does)",
    )
    overlong_penalty: float = Field(1.0, ge=0, description="what a completion of max_completion_length pays")


class GSPOConfig(PolicyConfig):
    """Zheng et al. 2025 (GSPO, arXiv 2507.18071), sections 4 and 5."""

    num_mini_batches: NumMiniBatches = 4
    clip_ratio_low: ClipLow = 3e-4
    clip_ratio_high: ClipHigh = 4e-4
    loss_aggregation: LossAggregation = "sequence"
    recompute_logprobs: RecomputeLogprobs = True
    scale_rewards: RewardScale = "group"


class CISPOConfig(PolicyConfig):
    """MiniMax 2025 (MiniMax-M1, arXiv 2506.13585), section 3.1, which names no number for its bound."""

    num_mini_batches: NumMiniBatches = 4
    clip_ratio_low: ClipLow = 1.0
    clip_ratio_high: ClipHigh = 0.28
    scale_rewards: RewardScale = "group"

    @model_validator(mode="after")
    def _bounds_weights_alone(self) -> CISPOConfig:
        if self.dual_clip is not None:
            raise ValueError("CISPO bounds importance weights by clip_ratio_high; take dual_clip out")
        return self


class RLOOConfig(PolicyConfig):
    """Ahmadian et al. 2024 (Back to basics, arXiv 2402.14740), equation 8, after Kool et al. 2019."""

    loss_aggregation: LossAggregation = "sequence"
    kl_coef: KLCoef = 0.05
    kl_in: KLPlace = "reward"
    kl_estimator: KLEstimator = "k1"
    recompute_logprobs: RecomputeLogprobs = True
    importance: Literal["sequence", "token"] = Field(
        "sequence", description="a completion is one action, or each of its tokens is"
    )


class ReinforcePPConfig(PolicyConfig):
    """Hu et al. 2025 (REINFORCE++, arXiv 2501.03262); with `baseline: group`, its REINFORCE++-baseline.

    That form pays KL in the loss, by k2, where these two keys are not set otherwise.
    """

    kl_coef: KLCoef = 0.01
    kl_in: KLPlace = "reward"
    kl_estimator: KLEstimator = "k1"
    baseline: Literal["none", "group"] = Field(
        "none",
        description="what is taken off a completion's score: nothing, or the mean of its prompt's (then kl_in is "
        "loss and kl_estimator k2 by default)",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount of rewards per token")

    @model_validator(mode="before")
    @classmethod
    def _baseline_form_pays_kl_in_the_loss(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("baseline") != "group":
            return values
        values = {"kl_in": "loss", **values}
        return {"kl_estimator": "k2", **values} if values["kl_in"] == "loss" else values


class ReMaxConfig(PolicyConfig):
    """Li et al. 2024 (ReMax, arXiv 2310.10505), algorithm 1."""

    loss_aggregation: LossAggregation = "constant"
    kl_coef: KLCoef = 0.05
    kl_in: KLPlace = "reward"
    kl_estimator: KLEstimator = "k1"


class OnlineDPOConfig(UpdatesConfig):
    """Guo et al. 2024 (OAIF, arXiv 2402.04792); rounds: Xu et al. 2024 (arXiv 2404.10719), DPO-Iter."""

    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference; in IPO the paper's tau")
    loss_type: Literal["sigmoid", "ipo"] = Field("sigmoid", description="DPO, or IPO per token")
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="of a prompt's completions: best and worst, or every two that differ in score"
    )
    labels: Literal["hard", "soft"] = Field(
        "hard", description="the higher score wins, or wins with the Bradley-Terry probability of the difference"
    )
    missing_eos_penalty: float | None = Field(
        None, description="taken off the score of a completion that ran into the length limit"
    )
    steps_per_round: int | None = Field(
        None, ge=1, description="steps after which the reference becomes the actor (null: as `reference` says)"
    )

    @model_validator(mode="after")
    def _soft_labels_are_of_the_sigmoid(self) -> OnlineDPOConfig:
        if self.loss_type == "ipo" and self.labels == "soft":
            raise ValueError("labels: soft is of loss_type sigmoid; set one of them otherwise")
        return self


class RAFTConfig(UpdatesConfig):
    """Dong et al. 2023 (RAFT, arXiv 2304.06767), algorithm 1; `min_score` is rejection sampling."""

    num_kept: int = Field(1, ge=1, description="completions of a prompt that are trained on, the best")
    min_score: float | None = Field(None, description="completions that score less are not trained on")
    loss_aggregation: LossAggregation = "token"
    kl_coef: KLCoef = 0.0
    kl_estimator: KLEstimator = "k1"
    missing_eos_penalty: float | None = Field(
        None, description="taken off the score of a completion that ran into the length limit"
    )
