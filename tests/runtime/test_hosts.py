"""A plan that names hosts is the plan of the processes that run on their devices."""

import pytest

from meshift.errors import ConfigError
from meshift.runtime.planned_run import planned
from meshift.runtime.plans import mesh_of, placements_of
from meshift.runtime.ppo_run import PPO_METHOD, ppo_uses


def plan_of(actor, critic, reference=None):
    found = {"actor": {"train": actor}, "critic": {"train": critic}}
    return found if reference is None else found | {"reference": {"infer": reference}}


@pytest.fixture
def make_config(ppo_config_on_disk, tmp_path):
    return lambda plan, launcher="ray": ppo_config_on_disk(
        tmp_path / "run", plan=plan, launch={"launcher": launcher}
    )


def test_hosts_get_the_numbers_of_their_processes(make_config):
    config = make_config(
        plan_of(
            {"mesh": "n10:4-5,n2:1", "layout": "d3"},
            {"mesh": "n2:1", "layout": "d1"},
            {"mesh": "n10:5,n2:0", "layout": "d2"},
        )
    )
    assert str(mesh_of(config.plan, ppo_uses(config))) == "n2:0-1,n10:4-5"
    placements = placements_of(config.plan, ppo_uses(config))
    assert str(placements["actor"]["train"].mesh) == "2-3,1"
    assert str(placements["critic"]["infer"].mesh) == "1"
    assert str(placements["reference"]["infer"].mesh) == "3,0"
    assert str(placements["reward"]["infer"].mesh) == "0", "a role that is not named is with the first device"


def test_numbers_stay_as_they_are(make_config):
    config = make_config(plan_of({"mesh": "2,0-1", "layout": "d3"}, {"mesh": "1", "layout": "d1"}))
    assert str(mesh_of(config.plan, ppo_uses(config))) == "0-2"
    assert str(placements_of(config.plan, ppo_uses(config))["actor"]["train"].mesh) == "2,0-1"


def test_hosts_in_some_meshes_only_would_mean_anything(make_config):
    config = make_config(plan_of({"mesh": "a:0-1", "layout": "d2"}, {"mesh": "2-3", "layout": "d2"}))
    with pytest.raises(ConfigError, match=r"`plan\.critic\.\w+\.mesh` names no host, but other meshes"):
        placements_of(config.plan, ppo_uses(config))


def test_one_machine_has_no_hosts(make_config):
    config = make_config(plan_of({"mesh": "a:0", "layout": "d1"}, {"mesh": "0", "layout": "d1"}), "local")
    with pytest.raises(
        ConfigError, match=r"`plan\.actor\.\w+` is on a:0, .*; give numbers only, or set launch\.lau"
    ):
        planned(config, PPO_METHOD)
