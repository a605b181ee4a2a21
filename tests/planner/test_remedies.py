"""What is said to make a step fit does so, and less of it does not."""

from dataclasses import replace

import pytest
from tiny_steps import device, llama, step

from meshift.config.sections import LoraConfig
from meshift.models.hf.adapter_targets import adapter_for
from meshift.planner.memory import Machine
from meshift.planner.planning import make_plan

LARGE = llama(layers=4, hidden=2048)


def short(memory, num_devices=1, method="ppo", **changes):
    given = step(method, actor=LARGE, critic=LARGE)
    hardware = replace(device(memory), **changes)
    planned = make_plan(given, hardware, num_devices, seconds=1)
    assert planned.lacking > 0
    return given, hardware, planned.changes


def with_lora(given):
    roles = {
        name: replace(role, config=replace(role.config, adapter=adapter_for(role.config, LoraConfig())))
        if role.trained
        else role
        for name, role in given.roles.items()
    }
    return replace(given, roles=roles)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [1.0, 1.5, 2.5])
def test_what_is_advised_fits_and_one_device_fewer_does_not(memory):
    given, hardware, changes = short(memory)
    counts = [int(one.split()[0]) for one in changes if " devices instead of 1" in one and " and " not in one]
    assert len(counts) == 1
    assert make_plan(given, hardware, counts[0], seconds=2).lacking == 0
    assert make_plan(given, hardware, counts[0] - 1, seconds=2).lacking > 0 or counts[0] == 2
    alone = any("lora" in one and "," not in one.replace("lora,", "") for one in changes)
    assert alone == (make_plan(with_lora(given), hardware, 1, seconds=1).lacking == 0)


def test_only_what_there_is_is_advised_and_on_a_cpu_memory_of_the_host():
    _, hardware, changes = short(1.0)
    assert not any("kl_coef" in one for one in changes)  # PPO reads its reference whatever it weighs
    assert any(one.endswith(f"in place of {hardware.name}") for one in changes)
    assert not any("GB" in one for one in changes)
    _, _, changes = short(1.0, machine=Machine(packs=True))
    assert any(one.endswith("GB of memory on the host") for one in changes)
    assert not any("h100" in one for one in changes)
