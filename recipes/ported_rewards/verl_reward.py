"""A reward function as verl's `custom_reward_function.path` names it. It knows nothing of Meshift."""

import re
from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, Any]:
    """1 where the last number of the solution is the right one, and a tenth where there is any number."""
    if data_source != "sums":
        raise NotImplementedError(f"no score for {data_source}")
    numbers = re.findall(r"-?\d+", solution_str)
    is_right = bool(numbers) and numbers[-1] == ground_truth
    return {"score": 1.0 if is_right else 0.1 if numbers else 0.0, "acc": is_right, "num_numbers": len(numbers)}
