"""A tiny rollout of letters, and reward functions called on it, for the tests of rewards."""

from meshift.batch import WHERE, Batch, Ragged, column_key
from meshift.config.sections import RewardFunctionConfig
from meshift.rewards.configured import load_functions
from meshift.rewards.functions import RewardFunctions, WeightedFunction

LETTERS = "abcdefgh"


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


def decode_all(ids):
    """With special tokens, which `h` stands for."""
    return decode(ids).replace("h", "<end>")


def rollout(prompts=("ab", "c"), completions=("de", "fga"), first=0, where=True, **columns):
    """Prompts "ab" and "c", completions "de" and "fga", at lines 1 and 2 of data.jsonl; sequences from `first`."""
    rows = [[LETTERS.index(letter) for letter in p + c] for p, c in zip(prompts, completions, strict=True)]
    fields = {
        "tokens": Ragged.from_rows(rows),
        "completion_lengths": Ragged.scalars([len(c) for c in completions]),
        "index": Ragged.scalars(list(range(first, first + len(rows)))),
    }
    values = {column_key(name): list(column) for name, column in columns.items()}
    return Batch(fields, values | ({WHERE: [f"data.jsonl:{i + 1}" for i in range(len(rows))]} if where else {}))


def names_of(batch):
    return tuple(key.removeprefix("column/") for key in batch.columns if key != WHERE)


def host_call(functions, batch):
    return RewardFunctions(functions=functions, decode=decode, decode_all=decode_all, columns=names_of(batch))


def untimed(metrics):
    """Those that are the same each time."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def score(*functions, batch=None):
    """(function, weight) pairs on the batch -> scores, metrics."""
    batch = rollout() if batch is None else batch
    weighted = [WeightedFunction(name=f.__name__, function=f, weight=w) for f, w in functions]
    outcome = host_call(weighted, batch)(batch)
    return outcome.batch["function_scores"].values.nan_to_num(0.0).tolist(), untimed(outcome.metrics)


def score_spec(spec, batch=None, **keys):
    """A function by its config keys on the batch -> scores, metrics."""
    batch = rollout() if batch is None else batch
    outcome = host_call(load_functions([RewardFunctionConfig(function=str(spec), **keys)]), batch)(batch)
    return outcome.batch["function_scores"].values.nan_to_num(0.0).tolist(), untimed(outcome.metrics)
