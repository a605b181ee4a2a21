"""A run whose roles leave the device between calls is the run in which they stay, and they are away meanwhile."""

import pytest
import torch
from safetensors.torch import load_file

from meshift.runtime import role as role_module
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import build_ppo_job, run_ppo
from meshift.runtime.run import run_job

OFFLOADED = {"actor": {"offload": True}, "critic": {"offload": True}, "reference": {"offload": True}}
MOVING = {"reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 1}}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let a CPU's memory be taken for a device's: storages are freed and filled all the same."""
    monkeypatch.setattr(role_module, "pays_on", lambda device: True)


def final_weights(run):
    return {folder: load_file(run / folder / "model.safetensors") for folder in ("final", "final_critic")}


def assert_same(one, other):
    for folder, weights in final_weights(one).items():
        for name, weight in final_weights(other)[folder].items():
            assert weights[name].equal(weight), f"{folder}: {name}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_roles_that_leave_would_learn_something_else(ppo_config_on_disk, tmp_path, as_on_a_gpu, dtype):
    sections = {"dtype": dtype, "max_steps": 3, **MOVING}
    run_ppo(ppo_config_on_disk(tmp_path / "stay", **sections), SilentObserver())
    away = {}

    class Watcher(SilentObserver):
        def on_call(self, step, name):
            where = {key: role.offload is not None and role.offload.is_away for key, role in roles.items()}
            away.setdefault(name, []).append(where)

    roles = {}

    def build(config):
        job = build_ppo_job(config)
        roles.update(job.roles)
        return job

    config = ppo_config_on_disk(tmp_path / "leave", plan=OFFLOADED, save_steps=1, **sections)
    run_job(config, build, Watcher())
    assert_same(tmp_path / "leave", tmp_path / "stay")
    assert all(not one["reward"] for ones in away.values() for one in ones)
    assert all(one["critic"] and one["reference"] for one in away["rollout"])
    assert all(one["actor"] and one["critic"] for one in away["reference"])
    for name in OFFLOADED:  # after the calls too, and after what a sync and a checkpoint read of them
        assert all(one[name] for one in away["checkpoint"]), name
        assert away["saving"][0][name]
    assert roles["actor"].offload.moved.num_bytes > 0


def test_a_run_would_not_go_on_from_what_is_away(ppo_config_on_disk, tmp_path, as_on_a_gpu):
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for max_steps in steps:
            sections = {"plan": OFFLOADED, "save_steps": 1, "max_steps": max_steps, **MOVING}
            config = ppo_config_on_disk(tmp_path / name, resume=max_steps > steps[0], **sections)
            run_ppo(config, SilentObserver())
            if max_steps < 4:
                for folder in ("final", "final_critic"):
                    (tmp_path / name / folder).rename(tmp_path / folder)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_on_a_cpu_nobody_leaves(ppo_config_on_disk, tmp_path):
    job = build_ppo_job(ppo_config_on_disk(tmp_path / "run", plan=OFFLOADED))
    assert job.roles["actor"].model.device == torch.device("cpu")
    assert all(role.offload is None for role in job.roles.values())
