"""`meshift sft`, `reward`, `dpo` and `ppo`: what is shown of a run, and what an interrupted one says it kept."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshift.cli.command import Command
from meshift.cli.main import COMMANDS, main
from meshift.cli.train import Training, configure
from meshift.config.runs import RewardRunConfig
from meshift.errors import NonFiniteError
from meshift.runtime import preflight


@dataclass(frozen=True)
class Result:
    output_dir: Path
    final_dir: Path
    metrics: dict


def run_steps(config, observer, num_steps, error=None):
    observer.on_message("2 pairs were left out")
    observer.on_start(3, "reward model")
    for step in range(num_steps):
        observer.on_call(step, "train_reward")
        observer.on_step(step, {"loss": 0.5, "accuracy": 0.75})
    if error is not None:
        raise error
    observer.on_finish()
    folder = Path(config.output_dir)
    return Result(folder, folder / "final", {"loss": 0.5, "accuracy": 0.75, "grad_norm": 1.0})


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    def call(run, *words):
        def check(config):
            return [("batch", f"{config.data.batch_size} pairs [of texts]")]

        training = Training(schema=RewardRunConfig, load=lambda: (run, check))
        fake = Command(name="reward", summary="", description="", example="", configure=configure, run=training)
        monkeypatch.setattr("meshift.cli.main.COMMANDS", {"reward": fake})
        keys = [f"output_dir={tmp_path / 'run'}", "data.dataset_name=d", "model.model_name_or_path=m"]
        return main(["reward", *keys, *words])

    return call


def test_a_finished_run_says_what_it_reached_and_where_it_lies(invoke, capsys, tmp_path):
    assert invoke(lambda config, observer: run_steps(config, observer, 3)) == 0
    out, err = capsys.readouterr()
    assert "accuracy  0.75" in out
    assert "grad_norm" not in out
    assert str(tmp_path / "run" / "final") in out
    assert "note: 2 pairs were left out" in err
    assert "step 3/3" in err


def test_a_finished_run_says_how_peft_loads_its_adapters(invoke, capsys, tmp_path):
    def run(config, observer):
        for name, task in (("final", "CAUSAL_LM"), ("final_critic", "SEQ_CLS")):
            folder = tmp_path / "run" / name
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps({"task_type": task}))
        return run_steps(config, observer, 1)

    assert invoke(run) == 0
    out = "".join(capsys.readouterr().out.split())
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path}/run/final")' in out
    assert (
        f'AutoPeftModelForSequenceClassification.from_pretrained("{tmp_path}/run/final_critic",num_labels=1)'
        in out
    )


def test_a_dry_run_prints_the_arithmetic_and_runs_nothing(invoke, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "weight_problems", lambda config: [])  # of the models that are not there
    monkeypatch.setattr(preflight, "memory_of", lambda config: (True, "little"))

    def run(config, observer):
        raise AssertionError("a dry run must not train")

    assert invoke(run, "--dry-run", "data.batch_size=7") == 0
    out = capsys.readouterr().out
    assert "nothing was trained" in out
    assert "7 pairs [of texts]" in out


def test_an_interrupted_run_says_what_was_kept(invoke, capsys, tmp_path):
    assert invoke(lambda config, observer: run_steps(config, observer, 2, KeyboardInterrupt())) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    kept = f"{tmp_path / 'run'} keeps config, metrics and samples of steps 1 to 2, but no model"
    assert last == f"meshift: interrupted; {kept}"
    assert invoke(lambda config, observer: run_steps(config, observer, 0, KeyboardInterrupt())) == 130
    assert "before the first step" in capsys.readouterr().err.splitlines()[-1]


def test_a_failed_run_ends_with_its_sentence(invoke, capsys):
    assert invoke(lambda config, observer: run_steps(config, observer, 1, NonFiniteError("the loss is nan"))) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "meshift: the loss is nan"


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_the_commands_find_their_runs(name):
    run, check = COMMANDS[name].run.load()
    assert (run.__name__, check.__name__) == (f"run_{name}", f"check_{name}")


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "remax"])
def test_the_methods_without_a_critic_share_a_run_and_have_keys_of_their_own(name, capsys):
    training = COMMANDS[name].run
    run, check = training.load()
    assert (run.__name__, check.__name__) == ("run_policy", "check_policy")
    assert main([name, "--help-config"]) == 0
    out = capsys.readouterr().out
    assert f"{training.schema.SECTION}.kl_estimator" in out
    assert "critic." not in out


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sft", ["data.loss_on", "(completion, assistant, all)", "model.learning_rate", "2.0e-05", "eval_steps"]),
        ("dpo", ["dpo.beta", "dpo.loss_type", "(sigmoid, ipo)", "actor.learning_rate", "1.0e-06", "reference."]),
        ("reward", ["reward.center_rewards_coefficient", "data.weight_by_prompt"]),
    ],
)
def test_help_lists_the_methods_keys_with_defaults_and_choices(name, keys, capsys):
    assert main([name, "--help-config"]) == 0
    listed = capsys.readouterr().out
    assert all(key in listed for key in keys)
    assert main([name, "--help"]) == 0
    assert f"usage: meshift {name}" in capsys.readouterr().out
