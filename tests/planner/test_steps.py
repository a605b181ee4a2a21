"""The step that is planned has the calls of the algorithm's graph, and waits where that does."""

import pytest

from meshift.algorithms.dpo import dpo_graph
from meshift.algorithms.policy_graph import Drawing
from meshift.algorithms.ppo import PPO
from meshift.config.policy_runs import DAPORunConfig, GRPORunConfig, RLOORunConfig
from meshift.config.runs import DPORunConfig, PPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.errors import ConfigError
from meshift.graph.calls import ModelCall, SyncCall
from meshift.models.hf.families import read_config
from meshift.planner.steps import Lengths, role_names, step_of
from meshift.runtime.policy_run import METHODS, policy_models
from meshift.runtime.ppo_run import role_models
from meshift.runtime.rollout_run import sketched_sampling

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 47, "num_hidden_layers": 5}
LLAMA = read_config({"model_type": "llama", "num_attention_heads": 4, **SIZES}, "a test")
SHARED = {"output_dir": "runs/x", "data": {"dataset_name": "x.jsonl", "batch_size": 8}}
FUNCTION = {"functions": [{"function": "x.py:f"}]}


def config(kind, **sections):
    return kind.model_validate({**SHARED, "actor": {"model_name_or_path": "a"}, **sections})


CASES = {
    "ppo": lambda: config(PPORunConfig, reward={"model_name_or_path": "r"}),
    "ppo with a moving reference": lambda: config(
        PPORunConfig, reward=FUNCTION, reference={"sync_ref_model": True, "ref_model_sync_steps": 3}
    ),
    "grpo": lambda: config(GRPORunConfig, reward=FUNCTION),
    "grpo that reads old log-probs again": lambda: config(
        GRPORunConfig, reward=FUNCTION, grpo={"recompute_logprobs": True, "num_iterations": 2, "kl_coef": 0.1}
    ),
    "rloo": lambda: config(RLOORunConfig, reward={"model_name_or_path": "r"}),
    "dpo": lambda: config(DPORunConfig),
    "dpo with known references": lambda: config(DPORunConfig, dpo={"precompute_ref_log_probs": True}),
}


def graph_of(given):
    if isinstance(given, DPORunConfig):
        return dpo_graph(given)
    sampling, functions = sketched_sampling(given)
    if isinstance(given, PPORunConfig):
        return PPO(given, sampling).graph(functions)
    return METHODS[type(given)][1](given, Drawing(sampling=sampling, reward_functions=functions))


def ancestors(edges, name):
    return set().union(*({one} | ancestors(edges, one) for one in edges[name]))


@pytest.mark.parametrize("case", CASES)
def test_a_planned_step_is_the_graph_of_its_algorithm(case):
    given = CASES[case]()
    planned = step_of(given, dict.fromkeys(role_names(given), LLAMA), "bfloat16")
    graph = graph_of(given)
    models = {call.name: call for call in graph.order() if isinstance(call, ModelCall)}
    assert [(c.name, c.role, c.kind) for c in planned.calls] == [(c.name, c.role, c.kind) for c in models.values()]
    edges = {call.name: call.waits for call in planned.calls}
    for name in edges:
        assert ancestors(edges, name) == ancestors(graph.edges, name) & set(models)
    for call in planned.calls:
        if call.kind == "train":
            task = models[call.name].task
            assert (call.num_passes, call.num_updates) == (task.num_epochs, task.num_mini_batches)
    syncs = [(c.source, c.target, c.every) for c in graph.order() if isinstance(c, SyncCall)]
    assert [(m.source, m.target, m.every) for m in planned.mixings] == syncs


def test_roles_start_from_the_models_that_a_run_gives_them():
    ppo, grpo = CASES["ppo"](), CASES["rloo"]()
    assert role_names(ppo) == role_models(ppo)
    assert role_names(grpo) == policy_models(grpo)
    assert role_names(CASES["dpo"]()) == {"actor": "a", "reference": "a"}


@pytest.mark.parametrize(("kind", "role"), [(SFTRunConfig, "actor"), (RewardRunConfig, "reward")])
def test_runs_on_given_texts_have_one_call(kind, role):
    given = kind.model_validate({**SHARED, "model": {"model_name_or_path": "m"}})
    (call,) = step_of(given, {role: LLAMA}, "float32").calls
    assert (call.role, call.kind) == (role, "train")
    assert call.texts.longest == given.data.max_length


def test_lengths_are_half_of_the_limits_unless_they_are_told():
    given = CASES["grpo"]()
    usual = step_of(given, {"actor": LLAMA}, "bfloat16").calls[0].texts
    assert (usual.prompt, usual.completion) == (256, 64)
    told = step_of(given, {"actor": LLAMA}, "bfloat16", Lengths(prompt=100, completion=500)).calls[0].texts
    assert (told.prompt, told.completion) == (100, 128)


def test_methods_that_draw_in_rounds_are_refused():
    given = config(DAPORunConfig, reward=FUNCTION)
    with pytest.raises(ConfigError, match="rounds"):
        step_of(given, {"actor": LLAMA}, "bfloat16")
