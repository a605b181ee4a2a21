"""`meshift grpo`, `dapo`, `rloo` and the other methods without a critic: their words on the command line.

It knows nothing of how a run works.
"""

from __future__ import annotations

from meshift.cli.command import Command
from meshift.cli.train import Check, Run, Training, configure
from meshift.config.policy_runs import (
    CISPORunConfig,
    DAPORunConfig,
    DrGRPORunConfig,
    GRPORunConfig,
    GSPORunConfig,
    OnlineDPORunConfig,
    RAFTRunConfig,
    ReinforcePPRunConfig,
    ReMaxRunConfig,
    RLOORunConfig,
)

WRITES = (
    "Rewards are those of `meshift ppo`: a reward model, Python functions, or both. Writes metrics.jsonl,\n"
    "samples.jsonl, TensorBoard curves and final/, a plain Hugging Face folder."
)


def _load() -> tuple[Run, Check]:
    from meshift.runtime.policy_run import check_policy, run_policy

    return run_policy, check_policy


GRPO = Command(
    name="grpo",
    summary="align a model by GRPO: completions of a prompt are each other's baseline",
    description=(
        "Align a model by GRPO: several completions of each prompt are scored, and each is trained on by how\n"
        "much it is better than the others, with KL to a reference in the loss. No critic.\n" + WRITES
    ),
    example="meshift grpo --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=GRPORunConfig, load=_load),
)
DR_GRPO = Command(
    name="dr-grpo",
    summary="GRPO without its biases: no division by spread or length",
    description=(
        "Align a model by Dr. GRPO: as GRPO, but scores are not divided by their group's standard deviation,\n"
        "nor a completion's loss by its length.\n" + WRITES
    ),
    example="meshift dr-grpo --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=DrGRPORunConfig, load=_load),
)
DAPO = Command(
    name="dapo",
    summary="GRPO with a higher upper clip, dynamic sampling and a price for running long",
    description=(
        "Align a model by DAPO: as GRPO, with an upper clip that is higher than the lower one, further prompts\n"
        "in place of those whose completions all score the same, a mean over tokens, and a soft punishment of\n"
        "completions that come near the length limit.\n" + WRITES
    ),
    example="meshift dapo --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=DAPORunConfig, load=_load),
)
GSPO = Command(
    name="gspo",
    summary="GRPO with importance ratios of whole completions",
    description=(
        "Align a model by GSPO: as GRPO, with one importance ratio for a completion, its tokens' geometric\n"
        "mean, which is clipped as a whole.\n" + WRITES
    ),
    example="meshift gspo --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=GSPORunConfig, load=_load),
)
CISPO = Command(
    name="cispo",
    summary="GRPO with clipped importance weights, so that every token keeps its gradient",
    description=(
        "Align a model by CISPO: as GRPO, but the importance weight is clipped and held fixed, so that no\n"
        "token loses its gradient.\n" + WRITES
    ),
    example="meshift cispo --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=CISPORunConfig, load=_load),
)
RLOO = Command(
    name="rloo",
    summary="REINFORCE with the mean of a prompt's other completions as baseline",
    description=(
        "Align a model by RLOO: several completions of each prompt are scored, less KL to a reference, and\n"
        "each is compared with the mean of the others; a completion is one action.\n" + WRITES
    ),
    example="meshift rloo --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=RLOORunConfig, load=_load),
)
REINFORCE_PP = Command(
    name="reinforce++",
    summary="REINFORCE with KL per token and advantages normalised over the whole step",
    description=(
        "Align a model by REINFORCE++: KL to a reference is paid at every token, and advantages are normalised\n"
        "over the step. With reinforce_pp.baseline=group the mean of a prompt's completions is taken off first.\n"
        + WRITES
    ),
    example="meshift reinforce++ --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=ReinforcePPRunConfig, load=_load),
)
REMAX = Command(
    name="remax",
    summary="REINFORCE with the score of the greedy completion as baseline",
    description=(
        "Align a model by ReMax: completions are compared with the greedy one of the same prompt, which is\n"
        "drawn and scored as well.\n" + WRITES
    ),
    example="meshift remax --config run.yaml actor.learning_rate=1e-6 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=ReMaxRunConfig, load=_load),
)
ONLINE_DPO = Command(
    name="online-dpo",
    summary="DPO on pairs of the current policy's own completions, labelled by their scores",
    description=(
        "Align a model by online or iterative DPO: completions of each prompt are drawn and scored, best and\n"
        "worst (or every two) become a pair, and DPO trains on the pairs. With online_dpo.steps_per_round=N the\n"
        "reference becomes the actor after every N steps.\n" + WRITES
    ),
    example="meshift online-dpo --config run.yaml online_dpo.steps_per_round=10 max_steps=100 --dry-run",
    configure=configure,
    run=Training(schema=OnlineDPORunConfig, load=_load),
)
RAFT = Command(
    name="raft",
    summary="imitate the best of several completions (rejection sampling, best of n)",
    description=(
        "Align a model by RAFT: completions of each prompt are drawn and scored, and the best are imitated. With\n"
        "raft.min_score only those that score as much, so that a prompt may give none.\n" + WRITES
    ),
    example="meshift raft --config run.yaml generation.num_generations=8 raft.min_score=1 --dry-run",
    configure=configure,
    run=Training(schema=RAFTRunConfig, load=_load),
)
POLICY_COMMANDS = (GRPO, DR_GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE_PP, REMAX, ONLINE_DPO, RAFT)
