"""Small steps on small imaginary devices, whose every plan can be counted through."""

from types import MappingProxyType

from meshift.config.sections import TrainableConfig
from meshift.models.hf.families import FAMILIES, read_config
from meshift.planner.candidates import Problem
from meshift.planner.hardware import Hardware
from meshift.planner.workload import Mixing, PlannedCall, Role, Step, Texts

GIB = 2**30


def llama(layers=2, hidden=1024, heads=8):
    sizes = {
        "vocab_size": 8192,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
    }
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 4096}
    return read_config({"model_type": "llama", "architectures": [FAMILIES["llama"].causal], **sizes}, "a test")


def device(memory=4.0, per_host=8, far=0.2e9):
    return Hardware(
        name="small",
        memory=memory * GIB,
        flops=MappingProxyType({"bfloat16": 2e12, "float32": 1e12}),
        memory_rate=50e9,
        near_rate=2e9,
        far_rate=far,
        host_rate=4e9,
        per_host=per_host,
        layer_delay=2e-5,
        reserve=0.0,
    )


def texts(num_prompts=64, completion=64.0, most=256):
    return Texts(
        num_prompts=num_prompts, prompt=64, longest_prompt=64, completion=completion, longest_completion=most
    )


def step(method="ppo", actor=None, critic=None, given=None, **passes):
    """PPO, GRPO or DPO, of small models."""
    given = given or texts()
    trained = TrainableConfig(max_tokens_per_micro_batch=2048, **passes)
    actor, critic = actor or llama(), critic or llama()
    roles = {
        "actor": Role(name="actor", config=actor, head="lm", trained=True, passes=trained),
        "reference": Role(name="reference", config=actor, head="lm", averaged=method == "dpo"),
    }
    if method == "ppo":
        roles["critic"] = Role(name="critic", config=critic, head="value", trained=True, passes=trained)

    def call(name, role, kind, waits=(), updates=1):
        return PlannedCall(
            name=name,
            role=role,
            kind=kind,
            texts=given,
            waits=frozenset(waits),
            num_updates=updates,
            num_read=given.completion,
        )

    if method == "dpo":
        calls = [call("reference", "reference", "infer"), call("train_actor", "actor", "train", ["reference"])]
        return Step(roles=roles, calls=tuple(calls), mixings=(Mixing(source="actor", target="reference"),))
    calls = [call("rollout", "actor", "generate"), call("reference", "reference", "infer", ["rollout"])]
    if method == "ppo":
        calls.append(call("values", "critic", "infer", ["rollout"]))
    known = [one.name for one in calls]
    calls.append(call("train_actor", "actor", "train", known, 2))
    if method == "ppo":
        calls.append(call("train_critic", "critic", "train", known, 2))
    return Step(roles=roles, calls=tuple(calls))


def problem(method="ppo", num_devices=4, hardware=None, *, sharding=True, **changes):
    return Problem(step(method, **changes), hardware or device(), num_devices, sharding=sharding)
