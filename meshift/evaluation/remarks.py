"""What a reader of the numbers should know: a chat model that was not asked as one, and why nothing is right.

It knows what can be read off completions and marks, and no more: it names reasons, of which one may be it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from meshift.evaluation.answers import BOXED, MARKED, final_number
from meshift.evaluation.marking import Marks
from meshift.evaluation.saved import Saved
from meshift.evaluation.tasks import Task

SHOWN = 90
"""Characters of a verdict."""
CODE_BLOCK = "```"


def template_remark(model: str, has_template: bool, *, chat: bool) -> list[str]:
    """One where a model has a chat template and is asked without."""
    if chat or not has_template:
        return []
    return [f"{model} has a chat template, and is asked without it: as a base model is; --chat uses it"]


def unverified_remark(model: str, completions: str) -> str:
    """Of a file beside which nothing says who drew it."""
    return (
        f"that {model} wrote {completions} is what --model says: nothing beside the file says who did (unverified)"
    )


def zero_remarks(task: Task, saved: Sequence[Sequence[Saved]], marks: Sequence[Marks], *, chat: bool) -> list[str]:
    """Where no completion is right: a sentence with what at least half of them have in common that may be why."""
    flat = [one for of_one in saved for one in of_one]
    if any(right for mark in marks for right in mark.right):
        return []
    texts = [one.completion for one in flat]
    counts = {
        "empty": sum(not text.strip() for text in texts),
        "cut at the length limit (--max-new-tokens)": sum(one.truncated for one in flat),
        **_of_kind(task, texts, chat=chat),
    }
    found = [f"{what} in {num} of {len(flat)}" for what, num in counts.items() if 2 * num >= len(flat)]
    verdicts = Counter(wrong for mark in marks for wrong in mark.wrong if wrong)
    if verdicts and task.kind == "code":
        [(verdict, num)] = verdicts.most_common(1)
        found.append(f"the commonest verdict, of {num}: {verdict[:SHOWN].strip()}")
    why = "; ".join(found) or "completions and verdicts below say more"
    return [f"no completion of {len(flat)} is right: {why}"]


def _of_kind(task: Task, texts: Sequence[str], *, chat: bool) -> dict[str, int]:
    """What the answer was looked for by, and how many completions are without it."""
    if task.kind == "code":
        return {"no code block": sum(CODE_BLOCK not in text for text in texts)} if chat else {}
    no_box = [BOXED.search(text) is None for text in texts]
    if task.name == "math":
        return {r"no answer marker (\boxed{})": sum(no_box)}
    unmarked = sum(bare and MARKED.search(text) is None for bare, text in zip(no_box, texts, strict=True))
    no_number = sum(final_number(text) is None for text in texts)
    return {r"no answer marker (#### or \boxed{}; the last number counts)": unmarked, "no number": no_number}
