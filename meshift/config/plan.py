"""The keys of a plan: where each role's calls run, on which devices and in which layout.

It knows nothing of whether such devices exist or of how a model is cut; `runtime/plans.py` reads what is here.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from meshift.config.section import Section

Kind = Literal["generate", "infer", "train"]  # as `graph.calls` has them, which is above this
KINDS: tuple[Kind, ...] = ("generate", "infer", "train")


class PlacementConfig(Section):
    """A mesh and a layout of as many devices."""

    mesh: str | int = Field(description="devices, as `0-3` or `0,2`")
    layout: str = Field(description="ranks on each axis, as `d2t2p1`: data, tensor, pipeline")


class RolePlan(Section):
    """A role's placements by kind of call. One that is not given is that of `train`, or the only one there is.

    `offload`, `max_tokens_per_micro_batch` and `num_slots` need no placement, and no second process.
    """

    generate: PlacementConfig | None = Field(None, description="where completions are sampled")
    infer: PlacementConfig | None = Field(None, description="where log-probs, values or scores are read")
    train: PlacementConfig | None = Field(None, description="where the role is trained, and its weights live")
    offload: bool = Field(False, description="leave the GPU for the host's memory while no call uses the role")
    max_tokens_per_micro_batch: int | None = Field(
        None, ge=1, description="token budget of a pass, in place of the one where the role is trained"
    )
    num_slots: int | None = Field(
        None, ge=1, description="completions that each data rank decodes at a time, in place of generation's"
    )

    @property
    def placements(self) -> dict[Kind, PlacementConfig]:
        """Those that are given."""
        found = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: placement for kind, placement in found.items() if placement is not None}

    @property
    def stays_in_process(self) -> bool:
        """Whether it says what needs no placement."""
        return self.offload or self.max_tokens_per_micro_batch is not None or self.num_slots is not None

    @property
    def says_something(self) -> bool:
        """Whether it is more than `offload: false`."""
        return self.offload or self.model_fields_set != {"offload"}


class AutoPlan(Section):
    """What the planner chooses a plan for, before the launch."""

    devices: int | None = Field(None, ge=1, description="processes at most (null: GPUs, else cores)")
    seconds: float = Field(5.0, gt=0, description="time to search")
    completion_tokens: float | None = Field(None, gt=0, description="mean of completions (null: half the limit)")


AUTO = "auto"


class PlanConfig(Section):
    """A plan for the roles of a step; a role that is not named runs on device 0. Each method names its own.

    `plan: auto` stands for `plan: {auto: {}}`.
    """

    auto: AutoPlan | None = Field(None, description="`plan: auto`: the planner chooses, before the launch")

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, values: Any) -> Any:
        return {"auto": {}} if values == AUTO else values

    @model_validator(mode="after")
    def _is_chosen_or_given(self) -> Self:
        if self.auto is not None and self.roles:
            raise ValueError(
                f"`auto` is set and `{next(iter(self.roles))}` is given too; the planner places all roles, or none"
            )
        return self

    @property
    def is_given(self) -> bool:
        """Whether anything is planned; without a plan a run is one process."""
        return any(plan.placements or not plan.stays_in_process for plan in self.roles.values())

    @property
    def roles(self) -> dict[str, RolePlan]:
        """Those that anything is said of."""
        found = {role: getattr(self, role) for role in type(self).model_fields}
        return {role: plan for role, plan in found.items() if isinstance(plan, RolePlan) and plan.says_something}

    @property
    def offloaded(self) -> frozenset[str]:
        """Roles that leave the device between calls."""
        return frozenset(role for role, plan in self.roles.items() if plan.offload)


class PPOPlan(PlanConfig):
    """Of the four roles of PPO, and the two that a cost adds."""

    actor: RolePlan | None = Field(None, description="generate, train: {mesh: 0-3, layout: d2t2p1} each")
    critic: RolePlan | None = Field(None, description="infer, train: {mesh: 0-3, layout: d2t2p1} each")
    reference: RolePlan | None = Field(None, description="infer: {mesh: 0-3, layout: d2t2p1} each")
    reward: RolePlan | None = Field(None, description="infer: {mesh: 0-3, layout: d2t2p1} each")
    cost: RolePlan | None = Field(None, description="infer: {mesh: 0-3, layout: d2t2p1} each")
    cost_critic: RolePlan | None = Field(None, description="infer, train: {mesh: 0-3, layout: d2t2p1} each")


class PolicyPlan(PlanConfig):
    """Of the methods without a critic."""

    actor: RolePlan | None = Field(None, description="generate, infer, train: {mesh: 0-3, layout: d2t2p1} each")
    reference: RolePlan | None = Field(None, description="infer: {mesh: 0-3, layout: d2t2p1} each")
    reward: RolePlan | None = Field(None, description="infer: {mesh: 0-3, layout: d2t2p1} each")


class DPOPlan(PlanConfig):
    """Of an actor that reads held-out pairs too, and its reference."""

    actor: RolePlan | None = Field(None, description="infer, train: {mesh: 0-3, layout: d2t2p1} each")
    reference: RolePlan | None = Field(None, description="infer: {mesh: 0-3, layout: d2t2p1} each")


class ActorPlan(PlanConfig):
    """Of an actor that is alone, and reads held-out rows too; the model of SFT is one."""

    actor: RolePlan | None = Field(None, description="infer, train: {mesh: 0-3, layout: d2t2p1} each")


class RewardPlan(PlanConfig):
    """Of the model, whose role is the reward's."""

    reward: RolePlan | None = Field(None, description="infer, train: {mesh: 0-3, layout: d2t2p1} each")


class LaunchConfig(Section):
    """The processes of a run by plan: who starts them, what they pass on early, hanging, and restarts."""

    launcher: Literal["local", "ray"] = Field(
        "local", description="processes on this machine, or over Ray's nodes"
    )
    ray_address: str | None = Field(
        None, description="null: a private Ray on this machine; auto: the cluster it belongs to; or host:port"
    )
    ray_wait_s: float = Field(120.0, ge=0, description="how long to wait for devices that the cluster lacks")
    hardware: str | None = Field(
        None, description="what predictions are made for, as `meshift plan --hardware` (null: this machine)"
    )

    stream: bool = Field(True, description="let other devices read completions while generation goes on")
    stream_size: int = Field(16, ge=1, description="completions that are passed on together, at least")

    max_restarts: int = Field(3, ge=0, description="times the run goes on by itself after it lost a process")
    heartbeat_timeout_s: float = Field(60.0, gt=1, description="silence after which a process is taken to hang")
    hang_timeout_s: float = Field(1800.0, gt=0, description="time without any call begun or ended: all hang")
