"""Online DPO and RAFT in memory: their graphs with real roles on tiny models."""

import torch
from tiny_policy import PolicyWorld
from tiny_rl import tiny_model

from meshift.algorithms.policy_graph import Drawing
from meshift.config.loading import make_config
from meshift.config.sections import TrainableConfig
from meshift.models.attention import PackedAttention, packed_positions
from meshift.rewards.functions import RewardFunctions, WeightedFunction
from meshift.runtime.policy_run import CRITIC_FREE
from meshift.runtime.role import LocalRole
from meshift.runtime.rollout_run import sampling_task

VOCAB = 8
SCHEMAS = {schema.SECTION: schema for schema in CRITIC_FREE}


def next_probabilities(model, tokens, temperature=1.0):
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), packed_positions([len(tokens)]), PackedAttention([len(tokens)]))
        return torch.softmax(model.head(hidden[-1:])[0] / temperature, -1)


def total_variation(one, other):
    return float(0.5 * (one - other).abs().sum())


def choice_world(
    method, reward, num_tokens, *, num_steps, rate=3e-3, num_generations=4, num_prompts=6, sections=None, **keys
):
    """`reward(completion_ids) -> list[float]` over fresh actor and reference; `keys` are the method's."""
    generation = {"max_completion_length": num_tokens, "num_generations": num_generations}
    values = {
        "output_dir": "unused",
        "data": {"dataset_name": "unused", "batch_size": num_prompts},
        "actor": {
            "model_name_or_path": "unused",
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "logits_chunk": 512,
        },
        "reward": {"functions": [{"function": "unused:unused"}]},
        "generation": generation | keys.pop("generation", {}),
        method: keys,
    }
    config = make_config(SCHEMAS[method], values | (sections or {}))
    weighted = WeightedFunction(name="rule", function=reward, weight=1.0)
    functions = RewardFunctions(functions=[weighted], decode=str)
    drawing = Drawing(sampling=sampling_task(config, ()), reward_functions=functions, columns=("index",))
    graph = CRITIC_FREE[type(config)][1](config, drawing)
    model = {"vocab_size": VOCAB, "scale": 0.2}
    actor = LocalRole("actor", tiny_model("lm", **model), config.actor, trainable=True, max_steps=num_steps)
    roles = {"actor": actor.can_generate(64, str)}
    if config.has_reference:
        roles["reference"] = LocalRole("reference", tiny_model("lm", **model), TrainableConfig())
    return PolicyWorld(graph, roles, config.generation.num_generations)
