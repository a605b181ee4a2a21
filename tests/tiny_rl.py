"""Tiny random decoders, rollouts and a whole PPO in memory, for the tests of training, algorithms and roles."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from meshift.algorithms.ppo import PPO
from meshift.batch import Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.runs import PPORunConfig
from meshift.config.sections import TrainableConfig
from meshift.graph.calls import Graph
from meshift.models.decoder import Decoder
from meshift.models.hf.families import read_config
from meshift.rewards.functions import RewardFunctions, WeightedFunction
from meshift.runtime.role import LocalRole
from meshift.runtime.rollout_run import sampling_task
from meshift.step import run_step


def tiny_model(
    head="lm", *, vocab_size=13, tied=False, dtype=torch.float32, seed=0, hidden_size=16, scale=0.3
) -> Decoder:
    """Two layers of random weights, large enough for clearly uneven distributions."""
    raw = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    ).to_dict()
    model = Decoder(read_config(raw, "a test", None), head).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise / 3)
    return model.to(dtype)


def watch_logits(head) -> list[int]:
    """A list that gets the number of rows of logits each time the head makes some."""
    seen, make = [], head.part
    head.part = lambda hidden: seen.append(len(hidden)) or make(hidden)
    return seen


def random_rollout(num_rows=9, *, vocab_size=13, seed=0, max_prompt=5, max_completion=6) -> Batch:
    """Ragged prompts and completions with everything that a policy or value loss reads."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, max_prompt + 1, (num_rows,), generator=draw)
    lengths = torch.randint(1, max_completion + 1, (num_rows,), generator=draw)
    num_tokens, num_completion = int((prompts + lengths).sum()), int(lengths.sum())

    def normal(size):
        return torch.randn(size, generator=draw)

    return Batch(
        {
            "tokens": Ragged(torch.randint(vocab_size, (num_tokens,), generator=draw), prompts + lengths),
            "completion_lengths": Ragged.scalars(lengths),
            "logprobs": Ragged(-2.5 + normal(num_completion), lengths),
            "advantages": Ragged(normal(num_completion), lengths),
            "returns": Ragged(normal(num_completion), lengths),
            "values": Ragged(normal(num_completion + num_rows), lengths + 1),
        }
    )


def ppo_config(**sections: Any) -> PPORunConfig:
    """A config for PPO in memory: names are placeholders, nothing is loaded."""
    values = {
        "output_dir": "unused",
        "data": {"dataset_name": "unused"},
        "actor": {"model_name_or_path": "unused"},
        "reward": {"functions": [{"function": "unused:unused"}]},
        "ppo": {},
    }
    return make_config(PPORunConfig, values | sections)


@dataclass
class World:
    """PPO's graph with real roles on tiny models."""

    algorithm: PPO
    graph: Graph
    roles: dict[str, LocalRole]
    num_sequences: int = 0

    def step(self, prompts, step=0):
        """One step on these prompts (token ids); sequence numbers count on."""
        first, self.num_sequences = self.num_sequences, self.num_sequences + len(prompts)
        fields = {
            "prompts": Ragged.from_rows(prompts, torch.int64),
            "index": Ragged.scalars(list(range(first, self.num_sequences)), torch.int64),
        }
        return run_step(self.graph, self.roles, Batch(fields), step)


def make_world(reward, config: PPORunConfig, *, stops=(), max_steps=1, cost=None, **model) -> World:
    """`reward(completion_ids) -> list[float]` (by that name) over freshly drawn actor, critic and reference.

    With a `cost` of that signature there is a critic of it too.
    """
    algorithm = PPO(config, sampling_task(config, stops))
    functions, costs = (_functions(one) if one is not None else None for one in (reward, cost))
    options = {"trainable": True, "max_steps": max_steps}
    actor = LocalRole("actor", tiny_model("lm", **model), config.actor, seed=config.seed, **options)

    def critic(name, how, seed):
        fresh = tiny_model("value", **model)
        torch.nn.init.zeros_(fresh.head.weight)
        return LocalRole(name, fresh, how, seed=seed, **options)

    roles = {
        "actor": actor.can_generate(64, str),
        "critic": critic("critic", config.critic, config.seed + 1),
        "reference": LocalRole("reference", tiny_model("lm", **model), TrainableConfig()),
    }
    if cost is not None:
        roles["cost_critic"] = critic("cost_critic", config.cost_critic, config.seed + 2)
    return World(algorithm, algorithm.graph(functions, cost_functions=costs), roles)


def _functions(function) -> RewardFunctions:
    weighted = WeightedFunction(name="rule", function=function, weight=1.0)
    return RewardFunctions(functions=[weighted], decode=str)
