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
    module.Error = type("Error", (Exception,), {})
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


def test_a_resumed_run_would_begin_a_second_wandb_run(tmp_path, wandb_runs):
    for num_done in (0, 2, 0):
        with RunFolder(tmp_path, ("wandb",), overwrite=True, num_done=num_done) as folder:
            folder.write_metrics(num_done + 1, {"loss": 1.0})
    first, resumed, new = (run.options["id"] for run in wandb_runs)
    assert first == resumed != new
    assert {run.options["resume"] for run in wandb_runs} == {"allow"}


def test_a_login_that_is_missing_would_cost_the_old_run(tmp_path, wandb_runs, monkeypatch):
    with RunFolder(tmp_path, ()) as folder:
        folder.write_metrics(1, {"loss": 1.0})
    wandb = sys.modules["wandb"]

    def refuse(**options):
        raise wandb.Error("api_key not configured (no-tty).\n call wandb.login()")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(ConfigError, match=r"api_key not configured \(no-tty\)\. call.*`wandb login`.*offline"),
        RunFolder(tmp_path, ("wandb",), overwrite=True),
    ):
        pass
    assert "loss" in (tmp_path / "metrics.jsonl").read_text()
    with RunFolder(tmp_path, (), overwrite=True):
        pass  # and the lock is free


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
