"""The recipes for dialogue: each is valid once the data is named, and each starts where one before it ended."""

import json
import shlex
from pathlib import Path

import pytest
from tiny_dialogue import save_dialogue_model

from meshift.cli.main import main
from meshift.config.loading import load_config
from meshift.config.runs import DPORunConfig, PPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMAS = {"sft": SFTRunConfig, "reward": RewardRunConfig, "dpo": DPORunConfig, "ppo": PPORunConfig}


def load(name, *overrides):
    words = ("data.dataset_name=hh.jsonl[:1300]", *overrides)
    return load_config(SCHEMAS[name], RECIPES / f"hh_{name}.yaml", words)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_dialogue_recipe_needs_nothing_but_the_users_data(name):
    config = load(name)
    assert config.data.dataset_name == "hh.jsonl[:1300]"
    assert config.output_dir == f"runs/hh/{name}"
    assert config.data.apply_chat_template, "all four must see dialogues in the same words"
    if name != "ppo":
        measured = load(name, "data.eval_dataset_name=hh.jsonl[1300:]", "eval_steps=20")
        assert measured.data.eval_dataset_name == "hh.jsonl[1300:]"
    with pytest.raises(ConfigError, match=r"`data\.dataset_name` is needed"):
        load_config(SCHEMAS[name], RECIPES / f"hh_{name}.yaml")


def test_each_stage_starts_from_what_an_earlier_one_wrote():
    fine_tuned, scored = (f"{load(name).output_dir}/final" for name in ("sft", "reward"))
    assert load("reward").model.model_name_or_path == fine_tuned
    assert load("dpo").actor.model_name_or_path == fine_tuned
    ppo = load("ppo")
    assert ppo.actor.model_name_or_path == fine_tuned
    assert ppo.reward.model_name_or_path == scored


ASKED = ("what is rain ?", "how do I boil an egg ?", "who wrote it ?", "is tea good ?")
GIVEN = (" Water that falls.", " In hot water, for some minutes.", " I do not know.", " Yes, to many people.")


def write_dialogues(path):
    """Twelve pairs as in Anthropic's file: some of one turn and some of two, answers of many lengths."""
    rows = []
    for i in range(12):
        opened = f"\n\nHuman: {ASKED[i % 4]}\n\nAssistant:"
        if i % 3 == 0:
            opened += f"{GIVEN[i % 4]}\n\nHuman: {ASKED[(i + 1) % 4]}\n\nAssistant:"
        rows.append({"chosen": opened + GIVEN[(i + 1) % 4], "rejected": opened + GIVEN[(i + 2) % 4] + "!" * i})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command_of(name):
    """The command line that a recipe's comment gives, with twelve rows for thousands."""
    comment = [line.removeprefix("#").strip() for line in (RECIPES / f"hh_{name}.yaml").read_text().splitlines()]
    begin = next(i for i, line in enumerate(comment) if line.startswith("meshift "))
    end = next(i for i in range(begin, len(comment)) if not comment[i].endswith("\\"))
    words = shlex.split(" ".join(line.removesuffix("\\") for line in comment[begin : end + 1]))
    words = [word.replace("path/to/", "").replace("1300", "9") for word in words[1:]]
    return [str(RECIPES.parent / word) if word.startswith("recipes/") else word for word in words]


SHORT = ["max_steps=2", "dtype=float32", "report_to=[]", "data.batch_size=4"]
FREEZE_ONE = {
    "sft": ["model.num_frozen_layers=1", "model.model_name_or_path=tiny", "model.learning_rate=1e-2"],
    "reward": ["model.num_frozen_layers=1"],
    "dpo": ["actor.num_frozen_layers=1"],
    "ppo": ["actor.num_frozen_layers=1", "critic.num_frozen_layers=1", "generation.max_completion_length=6"],
}


def test_the_four_recipes_run_one_after_another_as_their_comments_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dialogues(tmp_path / "hh.jsonl")
    save_dialogue_model(tmp_path / "tiny")
    last = {}
    for name in ("sft", "reward", "dpo", "ppo"):
        command = command_of(name)
        assert command[0] == name
        assert main([*command, *SHORT, *FREEZE_ONE[name]]) == 0, capsys.readouterr().err
        metrics = (tmp_path / "runs" / "hh" / name / "metrics.jsonl").read_text().splitlines()
        last[name] = json.loads(metrics[-1])
        assert last[name]["training/global_step"] == 2
        assert (tmp_path / "runs" / "hh" / name / "final" / "model.safetensors").is_file()
    measured = [last["sft"]["eval/loss"], last["reward"]["eval/accuracy"], last["dpo"]["eval/loss"]]
    assert None not in measured, "held-out rows are measured at the end"
    assert last["dpo"]["loss"] != pytest.approx(0.6931472, abs=1e-9), "it moved from its reference"
    assert last["ppo"]["reward/mean"] is not None
    samples = (tmp_path / "runs/hh/ppo/samples.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["prompt"] for line in samples}
    turns = [prompt.startswith("user\n") and prompt.endswith("assistant\n") for prompt in prompts]
    assert all(turns), "PPO asks in the turns that the others were trained on"
    assert not [prompt for prompt in prompts if "Human:" in prompt]
