"""The critic-free methods in memory: configs, scored completions, whole graphs with real roles on tiny models."""

from dataclasses import dataclass
from typing import Any

import torch
from tiny_rl import tiny_model

from meshift.algorithms.policy_graph import Drawing
from meshift.batch import Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.policy_runs import GRPORunConfig
from meshift.config.sections import TrainableConfig
from meshift.graph.calls import Graph
from meshift.rewards.functions import RewardFunctions, WeightedFunction
from meshift.runtime.policy_run import METHODS
from meshift.runtime.role import LocalRole
from meshift.runtime.rollout_run import sampling_task
from meshift.step import run_step

SCHEMAS = {schema.SECTION: schema for schema in METHODS}


def policy_config(method: str = "grpo", **sections: Any) -> GRPORunConfig:
    """A config in memory: names are placeholders, nothing is loaded."""
    values = {
        "output_dir": "unused",
        "data": {"dataset_name": "unused", "batch_size": 4},
        "actor": {"model_name_or_path": "unused"},
        "reward": {"functions": [{"function": "unused:unused"}]},
        "generation": {"num_generations": 4, "max_completion_length": 6},
        method: {},
    }
    return make_config(SCHEMAS[method], values | sections)


def graph_of(config, reward_functions=lambda batch: batch, columns=(), more_prompts=None, stops=()) -> Graph:
    drawing = Drawing(
        sampling=sampling_task(config, stops),
        reward_functions=reward_functions,
        columns=columns,
        more_prompts=more_prompts,
    )
    return METHODS[type(config)][1](config, drawing)


def host_call(config):
    """The function of the call `advantages`."""
    return next(call for call in graph_of(config).calls if call.name == "advantages").function


def train_loss(config):
    """The loss of the call `train_actor`."""
    return next(call for call in graph_of(config).calls if call.name == "train_actor").task.loss


def scored_batch(scores, *, lengths=None, truncated=None, drift=None, key="function_scores", **extra) -> Batch:
    """What the host call `advantages` reads: rows with these scores; every token drifted by `drift` nats."""
    num_rows = len(scores)
    lengths = torch.tensor(lengths if lengths is not None else [2] * num_rows)
    ref = torch.linspace(-3, -1, int(lengths.sum()))
    fields = {
        key: Ragged.scalars(torch.tensor(scores, dtype=torch.float32)),
        "completion_lengths": Ragged.scalars(lengths),
        "truncated": Ragged.scalars(torch.tensor(truncated if truncated is not None else [False] * num_rows)),
        "logprobs": Ragged(ref + (drift or 0.0), lengths),
        **{name: Ragged.scalars(torch.tensor(values)) for name, values in extra.items()},
    }
    if drift is not None:
        fields["ref_logprobs"] = Ragged(ref, lengths)
    return Batch(fields)


def first_of_rows(ragged: Ragged) -> list[float]:
    return [float(row[0]) for row in ragged.rows()]


@dataclass
class PolicyWorld:
    """A method's graph with real roles on tiny models."""

    graph: Graph
    roles: dict[str, LocalRole]
    num_generations: int

    def step(self, prompts, step=0):
        """One step on these prompts (token ids), each completed `num_generations` times."""
        rows = [prompt for prompt in prompts for _ in range(self.num_generations)]
        first = step * len(rows)
        fields = {
            "prompts": Ragged.from_rows(rows, torch.int64),
            "index": Ragged.scalars(list(range(first, first + len(rows))), torch.int64),
        }
        return run_step(self.graph, self.roles, Batch(fields), step)


def make_policy_world(reward, config, *, stops=(), max_steps=1, more_prompts=None, **model) -> PolicyWorld:
    """`reward(completion_ids) -> list[float]` (by that name) over a freshly drawn actor and reference."""
    weighted = WeightedFunction(name="rule", function=reward, weight=1.0)
    functions = RewardFunctions(functions=[weighted], decode=str)
    graph = graph_of(config, functions, ("index",), more_prompts, stops)
    actor = LocalRole("actor", tiny_model("lm", **model), config.actor, trainable=True, max_steps=max_steps)
    roles = {"actor": actor.can_generate(64, str)}
    if config.has_reference:
        roles["reference"] = LocalRole("reference", tiny_model("lm", **model), TrainableConfig())
    return PolicyWorld(graph, roles, config.generation.num_generations)
