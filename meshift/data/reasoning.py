"""Tasks of `reasoning-gym` as rows, named `reasoning-gym:<task>` with options behind a question mark.

    reasoning-gym:chain_sum      reasoning-gym:leg_counting?size=500&seed=3&max_instances=4[:400]

Options are `size` (default 1000), `seed` (default 0) and those of the task. It knows nothing of scoring.
"""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from meshift.data.rows import Row, did_you_mean
from meshift.errors import DataError

GYM_PREFIX = "reasoning-gym:"
DEFAULT_SIZE = 1000


def reasoning_rows(source: str) -> Iterator[Row]:
    """A row per task: `prompt`, `answer`, and `reasoning_gym`, by which the reward function finds the task again.

    Raises DataError for a task or an option that is not there, and without the package.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise DataError(f"{source} needs the package reasoning-gym; run `pip install 'meshift[reasoning]'`")
    task, size, seed, options = parse_task(source)
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise DataError(f"{source}: reasoning-gym has no task {task!r}{did_you_mean(task, DATASETS)}")
    try:
        made = reasoning_gym.create_dataset(task, seed=seed, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"{source}: {task} cannot be made ({error}); correct its options.") from error
    known = {"task": task, "seed": seed, "size": size, "options": options}
    for index in range(size):
        entry = made[index]
        found = {**known, "index": index, "question": entry["question"]}
        values = {"prompt": entry["question"], "answer": str(entry["answer"]), "reasoning_gym": found}
        yield Row(values=values, where=f"{source}:row {index + 1}")


def parse_task(source: str) -> tuple[str, int, int, dict[str, Any]]:
    """(task, size, seed, its own options); values are JSON, or else texts. Raises DataError."""
    task, _, query = source.removeprefix(GYM_PREFIX).partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError:
        raise DataError(f"{source}: write options as ?size=500&seed=3") from None
    options: dict[str, Any] = {key: _value(text) for key, text in pairs}
    size, seed = options.pop("size", DEFAULT_SIZE), options.pop("seed", 0)
    for name, number, least in (("size", size, 1), ("seed", seed, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise DataError(f"{source}: {name} is {number!r}; write a whole number from {least} on.")
    return task, size, seed, options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
