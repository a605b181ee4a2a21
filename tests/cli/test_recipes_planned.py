"""Every recipe of the repository goes through `meshift plan` with all that it can be asked to say."""

import json
from pathlib import Path

import pytest
import yaml

from meshift.cli.main import main

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SIZES = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
RAW = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 9, **SIZES}


def with_model(values, folder):
    """The values with this folder in place of every model, so that none is fetched or has to be trained first."""
    if isinstance(values, dict):
        return {k: folder if k == "model_name_or_path" else with_model(v, folder) for k, v in values.items()}
    return values


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan_with_its_reasons_and_its_random_steps(recipe, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    values = with_model(yaml.safe_load(recipe.read_text()), str(tmp_path))
    values["data"].setdefault("dataset_name", "given-on-the-command-line.jsonl")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    several = ["--command", "grpo"] if recipe.stem == "methods_sentiment" else []
    words = [*several, "--devices", "4", "--seconds", "0.2", "--prompt-tokens", "16", "--completion-tokens", "16"]
    assert main(["plan", "--config", str(file), *words, "--explain", "--simulate", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Memory is tightest in" in shown
    assert ("2 steps with random lengths take" in shown) == ("generation" in values)
