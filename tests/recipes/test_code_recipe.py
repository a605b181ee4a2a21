"""The recipe for programs: valid, and each of its problems is solved by a right function alone."""

import json
from pathlib import Path

from meshift.config.loading import load_config
from meshift.config.policy_runs import GRPORunConfig
from meshift.rewards.configured import load_functions

ROOT = Path(__file__).parents[2]
SOLUTIONS = {
    "double": "2 * x",
    "is_even": "n % 2 == 0",
    "larger": "max(a, b)",
    "last": "items[-1]",
    "total": "sum(numbers)",
    "count_vowels": "sum(c in 'aeiou' for c in text)",
    "reverse": "text[::-1]",
    "factorial": "1 if n == 0 else n * factorial(n - 1)",
    "squares": "[i * i for i in range(1, n + 1)]",
    "words": "text.split()",
    "mean": "sum(numbers) / len(numbers)",
    "is_palindrome": "text == text[::-1]",
    "initials": "''.join(word[0].upper() for word in name.split())",
    "without": "[item for item in items if item != value]",
    "absolute": "abs(x)",
    "fibonacci": "n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
}


def test_every_problem_is_solved_by_a_right_function_alone():
    config = load_config(GRPORunConfig, ROOT / "recipes" / "grpo_code.yaml")
    rows = [
        json.loads(line) for line in (ROOT / config.data.dataset_name).read_text(encoding="utf-8").splitlines()
    ]
    assert [row["entry_point"] for row in rows] == list(SOLUTIONS)
    [weighted] = load_functions(config.reward.functions)
    columns = {name: [row[name] for row in rows] for name in ("tests", "entry_point")}
    weighted.function.check_columns(["prompt", *columns])
    prompts = [row["prompt"] for row in rows]
    right = [f" {SOLUTIONS[row['entry_point']]}\n\nprint(" for row in rows]
    wrong = [" None" for _ in rows]
    logged = {}
    assert weighted.function(prompts, right, logged.__setitem__, **columns) == [1.0] * len(rows)
    assert weighted.function(prompts, wrong, logged.__setitem__, **columns) == [0.0] * len(rows)
    weighted.function._sandbox.close()
