"""A run by a plan on GPUs, one to a process, is the run on one of them; `pytest -m gpu` where there are such."""

import math

import pytest
import torch
from safetensors.torch import load_file

from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import run_ppo

SMOOTH = {"learning_rate": 0.01, "adam_epsilon": 1e-3}  # Adam magnifies the rounding of a tiny gradient


def at(mesh, layout):
    return {"mesh": mesh, "layout": layout}


PLANS = {
    "one": (1, {"actor": {"train": at("0", "d1t1p1")}}),
    "tensor": (2, {"actor": {"generate": at("0-1", "d2t1p1"), "train": at("0-1", "d1t2p1")}}),
    "apart": (2, {"actor": {"train": at("0", "d1t1p1")}, "critic": {"train": at("1", "d1t1p1")}}),
    "stages": (2, {"actor": {"generate": at("0-1", "d1t1p2"), "train": at("0-1", "d1t1p2")}}),
    "sharded": (2, {"actor": {"generate": at("0-1", "d1t2p1"), "train": at("0-1", "d2t1p1s")}}),
    "all": (4, {"actor": {"generate": at("0-3", "d2t2p1"), "train": at("0-3", "d2t1p2")}}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANS)
def test_gpus_would_compute_another_run(ppo_config_on_disk, actor_folder, tmp_path, read_lines, name):
    num_gpus, plan = PLANS[name]
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} CUDA devices")
    actor = {"model_name_or_path": str(actor_folder), "logits_chunk": 5, **SMOOTH}
    sections = {"actor": actor, "critic": SMOOTH, "max_steps": 3, "generation": {"max_completion_length": 6}}
    alone = run_ppo(ppo_config_on_disk(tmp_path / "alone", **sections), SilentObserver())
    spread = run_ppo(ppo_config_on_disk(tmp_path / "spread", plan=plan, **sections), SilentObserver())
    one, other = (read_lines(run.output_dir / "metrics.jsonl") for run in (spread, alone))
    assert len(one) == len(other) == 3
    for ours, theirs in zip(one, other, strict=True):
        for key in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg"):
            if key in theirs:
                assert math.isclose(ours[key], theirs[key], rel_tol=1e-2, abs_tol=1e-3), key
    for folder in ("final", "final_critic"):
        ours, theirs = (load_file(run.output_dir / folder / "model.safetensors") for run in (spread, alone))
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, atol=2e-3, rtol=1e-2)
