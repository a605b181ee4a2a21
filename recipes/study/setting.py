"""What a study runs, as a YAML file says it: every key with its default and meaning. It knows nothing of how."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from meshift.config.section import Section


class TheorySetting(Section):
    """The counter-example and the 8 x 8 scenario."""

    num_seeds: int = Field(20, ge=2, description="of the 8 x 8 scenario")
    pairs_per_prompt: list[int] = Field(
        [1, 2, 4, 6], description="wrong responses (of 7) that the right one beats"
    )
    betas: list[float] = Field([0.1, 1.0], description="DPO's beta and PPO's KL coefficient")
    shown: list[float] = Field([4, 0.1], description="pairs per prompt and beta of the tables and curves shown")
    training: dict[str, Any] = Field({}, description="keys of `GridSetting` for all of them")


class PairsSetting(Section):
    """Preferences between the best and the worst of a prompt's completions by the reference, by true reward."""

    num_prompts: int = Field(448, ge=2, description="prompts; where all completions tie there is no pair")
    num_completions: int = Field(4, ge=2, description="completions drawn of each")
    num_heldout: int = Field(48, ge=1, description="pairs kept from training, for the reward model's accuracy")


class SweepSetting(Section):
    """One method over its strengths."""

    strengths: list[float] = Field(description="beta, KL coefficient, or steps (sft)")
    overrides: list[str] = Field([], description="key=value, as on the command line")


class SweepsSetting(Section):
    """Each method's; one that is null is not run."""

    sft: SweepSetting | None = None
    dpo: SweepSetting | None = None
    dpo_after_sft: SweepSetting | None = Field(None, description="starts from the first point of `sft`")
    online_dpo: SweepSetting | None = None
    ppo: SweepSetting | None = None

    @property
    def given(self) -> dict[str, SweepSetting]:
        """Those that are run, by method."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: sweep for name, sweep in found.items() if sweep is not None}

    @model_validator(mode="after")
    def _has_an_sft_to_start_from(self) -> SweepsSetting:
        if self.dpo_after_sft is not None and self.sft is None:
            raise ValueError("`dpo_after_sft` starts from the first point of `sft`; give that method a sweep too")
        return self


class AblationSetting(Section):
    """PPO with small and large batches, with and without normalised advantages and a moving reference."""

    small_batch: list[str] = Field(
        description="overrides of a small batch; as many completions in all as the large"
    )
    large_batch: list[str] = Field(description="overrides of a large one")
    small_ema_rate: float = Field(gt=0, lt=1, description="of the moving reference, per step of a small batch")
    large_ema_rate: float = Field(gt=0, lt=1, description="per step of a large one: as far per completion")
    overrides: list[str] = Field([], description="of all")


class SentimentSetting(Section):
    """A language model on film reviews with a known true reward."""

    seeds: list[int] = Field([0], min_length=1, description="of the reward model and of every policy")
    completion_length: int = Field(16, ge=1, description="tokens of every completion")
    num_heldout_prompts: int = Field(128, ge=2, description="on which policies are judged")
    keep_models: bool = Field(False, description="keep the weights of policies that nothing starts from")
    shared: list[str] = Field([], description="overrides of every run")
    pairs: PairsSetting = PairsSetting()
    reference: list[str] = Field([], description="overrides of the reference's fine-tuning")
    reward: list[str] = Field([], description="overrides of the reward model's training")
    sweeps: SweepsSetting = SweepsSetting()
    ablation: AblationSetting | None = None


class CodeSetting(Section):
    """MBPP with unit tests."""

    model: str = Field(
        "pypi:smollm2-135m-instruct", description="that is trained: a folder or a name, as in any run"
    )
    num_heldout: int = Field(40, ge=2, description="problems that models are judged on, the first of the file")
    num_train: int = Field(200, ge=1, description="problems behind these, for training")
    num_samples: int = Field(5, ge=1, description="completions of each held-out problem")
    ks: list[int] = Field([1, 5], description="k of pass@k")
    temperature: float = Field(0.8, gt=0, description="of these completions; training draws at 1")
    completion_length: int = Field(96, ge=1, description="new tokens at most")
    sft: list[str] | None = Field(
        None, description="of fine-tuning on the training problems' solutions, which PPO starts from; null: none"
    )
    overrides: list[str] = Field([], description="of the PPO run")


class StudySetting(Section):
    """All of a study."""

    output_dir: str = Field(description="the study's folder: a run per point, results, report.html")
    theory: TheorySetting = TheorySetting()
    sentiment: SentimentSetting | None = None
    code: CodeSetting | None = None
