"""The launcher that a config names is the one that is used, or the reason why not is one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshift.config.loading import dump_config
from meshift.errors import ConfigError
from meshift.layout.mesh import Mesh
from meshift.runtime.launch import launcher
from meshift.runtime.launch.launcher import launch, local_inputs
from meshift.runtime.observer import SilentObserver

ROOT = Path(__file__).parents[3]
PLAN = {"actor": {"train": {"mesh": "0-1", "layout": "d2"}}}


def test_without_ray_nothing_is_loaded_before_the_sentence(ppo_config_on_disk, tmp_path, monkeypatch):
    config = ppo_config_on_disk(tmp_path / "run", plan=PLAN, launch={"launcher": "ray"})
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "meshift\[ray\]"') as caught:
        launch(config, Mesh.parse("0-1"), "gang_members:add_up", "", SilentObserver())
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_to_install(ppo_config_on_disk, tmp_path):
    config = ppo_config_on_disk(tmp_path / "run", plan=PLAN, launch={"launcher": "ray"})
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    hidden = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'ray' else find(name, *rest)\n"
        "from meshift.cli.main import main; sys.exit(main(['ppo', '--config', sys.argv[1]]))"
    )
    words = [sys.executable, "-c", hidden, str(file)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert 'pip install "meshift[ray]"' in done.stderr


def test_files_that_every_node_has_to_see_are_found(ppo_config_on_disk, tmp_path, prompts_file, rewards_file):
    config = ppo_config_on_disk(tmp_path / "run")
    found = set(local_inputs(config))
    assert {prompts_file, rewards_file, config.actor.model_name_or_path} <= found
    sliced = config.model_copy(
        update={"data": config.data.model_copy(update={"dataset_name": f"{prompts_file}[:2]"})}
    )
    assert prompts_file in set(local_inputs(sliced))


def test_what_the_nodes_are_told_leaves_no_file_and_no_secret(ppo_config_on_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MESHIFT_KERNELS", "0")
    config = ppo_config_on_disk(tmp_path / "not" / "yet" / "run")
    with launcher._surroundings(config) as told:
        path, content = told.token
        assert Path(path).parent == tmp_path
        assert Path(path).read_text() == content
        assert told.variables["MESHIFT_KERNELS"] == "0"
        assert "secret" not in told.variables.values()
        assert told.directory == os.getcwd()
    assert not list(tmp_path.iterdir())


def test_a_private_cluster_has_a_token_and_is_on_loopback(monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", launcher.LOOPBACK_ONLY):
        monkeypatch.setenv(name, "x")  # so that it is put back as it was
        monkeypatch.delenv(name)
    launcher.keep_private()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ[launcher.LOOPBACK_ONLY] == "0"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    launcher.keep_private()
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "the user's own choice stays"
