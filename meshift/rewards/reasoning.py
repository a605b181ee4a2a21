"""The reward function `reasoning_gym`: answers to tasks of `reasoning-gym`, by their own scorers.

It is imported where that extra is installed. Tasks are made anew from their row's name, seed and number, so that
the scorer gets the very object that it knows; files of rows hold no more than that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import reasoning_gym as gym

from meshift.rewards.calling import named_errors
from meshift.rewards.scores import CallError

END_OF_THOUGHT = "</think>"
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym(
    completions: Sequence[Any], reasoning_gym: Sequence[Mapping[str, Any]], answer: str = "tags"
) -> list[float]:
    """Each answer's score, from 0 to 1; the column says which task each is of.

    Several of the package's scorers raise for an answer that is not of the form they take: it scores 0.
    Raises `ValueError` for a task that another version of the package made, where this one makes it differently.
    """
    return [_score(c, task, answer) for c, task in zip(completions, reasoning_gym, strict=True)]


def _score(completion: Any, task: Mapping[str, Any], where: str) -> float:
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    text = text.rpartition(END_OF_THOUGHT)[2]
    tagged = TAGGED.findall(text) if where == "tags" else []
    answer = (tagged[-1] if tagged else text).strip()
    tasks = _tasks(task["task"], task["seed"], task["size"], json.dumps(task["options"], sort_keys=True))
    entry = tasks[task["index"]]
    if entry["question"] != task["question"]:
        raise ValueError(
            f"task {task['index']} of {task['task']} is another one here: the data is of another version"
        )
    return _scored(tasks, answer, entry)


def _scored(tasks: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """0 where the scorer raises, unless it does so for the right answer too: then it is the scorer that fails."""
    try:
        with named_errors(tasks.score_answer):
            return float(tasks.score_answer(answer, entry))
    except CallError:
        if isinstance(entry["answer"], str):
            tasks.score_answer(entry["answer"], entry)
        return 0.0


@lru_cache(maxsize=64)
def _tasks(name: str, seed: int, size: int, options: str) -> Any:
    return gym.create_dataset(name, seed=seed, size=size, **json.loads(options))
