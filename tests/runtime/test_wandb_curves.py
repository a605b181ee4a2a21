"""Metrics reach Weights & Biases where it is there, and one sentence says how to install it where it is not."""

import importlib.util
import math
import sys
from types import ModuleType

import pytest

from meshift.config import runs as configs
from meshift.errors import ConfigError
from meshift.runtime.run_folder import RunFolder


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch):
    """The W&B runs that were begun, by a module that stands in for wandb's."""
    begun = []
    module = ModuleType("wandb")
    module.init = lambda **options: begun.append(FakeRun(**options)) or begun[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def test_finite_metrics_are_logged_under_their_step_and_the_run_is_finished(tmp_path, wandb_runs):
    with RunFolder(tmp_path / "ppo", ("wandb",)) as folder:
        folder.write_metrics(3, {"loss": 2.0, "grad_norm": math.nan})
    (run,) = wandb_runs
    assert run.options["name"] == "ppo"
    assert run.logged == [(3, {"training/global_step": 3, "loss": 2.0})]
    assert run.finished
    assert not (tmp_path / "ppo" / "tensorboard").exists()


def test_without_wandb_the_sentence_names_the_install_command(tmp_path, monkeypatch, ppo_config_on_disk):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(configs, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'meshift\[wandb\]'"):
        ppo_config_on_disk(tmp_path / "run", report_to=["wandb"])
    with (
        pytest.raises(ConfigError, match=r"pip install 'meshift\[wandb\]'"),
        RunFolder(tmp_path / "x", ("wandb",)),
    ):
        pass


def test_the_key_is_accepted_where_wandb_is_installed(tmp_path, monkeypatch, ppo_config_on_disk):
    monkeypatch.setattr(configs, "find_spec", lambda name: importlib.util.find_spec("json"))
    assert ppo_config_on_disk(tmp_path / "run", report_to=["tensorboard", "wandb"]).report_to[1] == "wandb"
