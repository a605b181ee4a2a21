"""`meshift ppo` by a plan writes what one process writes, and says in one sentence what a plan cannot be."""

import math

import pytest
import torch
from safetensors.torch import load_file

from meshift.errors import ConfigError
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import check_ppo, run_ppo

SMOOTH = {"learning_rate": 0.01, "adam_epsilon": 1e-3}  # Adam magnifies the rounding of a tiny gradient
PLAN = {
    "actor": {
        "generate": {"mesh": "0-3", "layout": "d4t1p1"},
        "train": {"mesh": "0-3", "layout": "d2t2p1"},
    },
    "critic": {"train": {"mesh": "2-3", "layout": "d1t2p1"}},
    "reference": {"infer": {"mesh": "0,1", "layout": "d2t1p1"}},
    "reward": {"infer": {"mesh": 1, "layout": "d1"}},
}


SHARDED = {
    "actor": {"train": {"mesh": "1,0", "layout": "d2t1p1s"}},  # where it generates, too
    "critic": {"train": {"mesh": "0-3", "layout": "d2t2p1s"}},
    "reference": {"infer": {"mesh": "2-3", "layout": "d2t1p1s"}},
    "reward": {"infer": {"mesh": 1, "layout": "d1"}},
}


class Listener(SilentObserver):
    def __init__(self):
        self.calls, self.steps = [], []

    def on_call(self, step, name):
        self.calls.append(name)

    def on_step(self, step, metrics):
        self.steps.append(step)


@pytest.fixture(scope="module")
def make_config(ppo_config_on_disk, actor_folder):
    def make(output_dir, **sections):
        actor = {"model_name_or_path": str(actor_folder), "logits_chunk": 5, **SMOOTH}
        defaults = {"actor": actor, "critic": SMOOTH, "max_steps": 3, "report_samples_every": 1}
        return ppo_config_on_disk(output_dir, **defaults | sections)

    return make


@pytest.fixture(scope="module")
def alone(make_config, tmp_path_factory):
    return run_ppo(make_config(tmp_path_factory.mktemp("alone") / "run"), SilentObserver())


@pytest.mark.parametrize("plan", [PLAN, SHARDED], ids=["copies", "sharded"])
def test_four_processes_write_what_one_writes(make_config, alone, tmp_path, read_lines, plan):
    listener = Listener()
    spread = run_ppo(make_config(tmp_path / "spread", plan=plan), listener)
    assert listener.steps == [0, 1, 2]
    assert {"rollout", "advantages"} <= set(listener.calls)
    for name in ("metrics.jsonl", "samples.jsonl"):
        one, other = read_lines(spread.output_dir / name), read_lines(alone.output_dir / name)
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            if name == "metrics.jsonl":
                used = [ours[f"perf/mfu/{role}"] for role in ("actor", "critic")]
                assert 0 < min(used) <= ours["perf/mfu"] <= max(used)
            for key in theirs:
                if not key.startswith(("timing_s/", "perf/")):
                    assert is_close(ours[key], theirs[key]), f"{name}: {key} is {ours[key]}, not {theirs[key]}"
    moves = plan is PLAN  # else the actor generates where it is trained
    assert all((row.get("sync/bytes", 0) > 0) == moves for row in read_lines(spread.output_dir / "metrics.jsonl"))
    for folder in ("final", "final_critic"):
        ours, theirs = (load_file(run.output_dir / folder / "model.safetensors") for run in (spread, alone))
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=1e-4)


def is_close(ours, theirs):
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-4) or (math.isnan(ours) and math.isnan(theirs))
    return ours == theirs


REFUSALS = {
    "a layout too small for its mesh": (
        {"actor": {"train": {"mesh": "0-3", "layout": "d2"}}},
        r"`plan\.actor\.train`: The layout d2t1p1 needs 2 devices, but the mesh `0-3` has 4",
    ),
    "no layout": ({"actor": {"train": {"mesh": 0, "layout": "x2"}}}, r"`plan\.actor\.train`: `x2` is no layout"),
    "a call that is not made": (
        {"reference": {"train": {"mesh": 0, "layout": "d1"}}},
        "`plan.reference.train` is set, but the reference has no such call",
    ),
    "a gap": ({"critic": {"train": {"mesh": "2-3", "layout": "d2"}}}, "uses the device 1; number the devices"),
    "a host": ({"critic": {"train": {"mesh": "a:0-1", "layout": "d2"}}}, "give numbers only"),
    "nothing": ({"actor": {}}, "`plan.actor` names no placement"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_plan_cannot_be_is_one_sentence(make_config, tmp_path, name):
    plan, sentence = REFUSALS[name]
    config = make_config(tmp_path / "run", plan=plan)
    for start in (check_ppo, lambda config: run_ppo(config, SilentObserver())):
        with pytest.raises(ConfigError, match=sentence):
            start(config)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_plan(make_config, tmp_path):
    rows = dict(check_ppo(make_config(tmp_path / "run", plan=PLAN)))
    assert rows["plan"].startswith("4 processes: actor.generate d4t1p1@0-3, actor.train d2t2p1@0-3, critic.infer")
