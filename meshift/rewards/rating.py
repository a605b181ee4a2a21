"""The reward function `judge`: a model behind a chat endpoint rates each completion.

It has TRL's signature. It knows nothing of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meshift.config.reward_kwargs import RatingConfig
from meshift.errors import ConfigError
from meshift.rewards.chat_endpoint import ChatEndpoint, UnreadableError, last_labelled
from meshift.rewards.scores import Fault
from meshift.rewards.signatures import RESERVED_ARGUMENTS

FIELD = re.compile(r"\{(\w+)\}")
# One number: no per cent, no range such as 7-8.
RATING = r"(-?(?:\d+(?:\.\d+)?|\.\d+))(?!\d|[.,]\d|[ \t]*%|[ \t]*(?:[-\u2013]|to\b)[ \t]*\d)"


class RatingJudge:
    """A reward from 0 to 1 per completion; a sample whose rating cannot be had is a fault of its own."""

    waits = True  # for a server: it is called in a thread, beside functions that compute here

    def __init__(self, config: RatingConfig) -> None:
        self.config = config
        self._endpoint = ChatEndpoint(config, self._read)

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise `ConfigError` where the question shows what the data does not have."""
        known = {"prompt", "completion", "lowest", "highest", *columns}
        for name in FIELD.findall(self.config.question):
            if name not in known:
                raise ConfigError(
                    f"the question of reward function judge shows {{{name}}}, which is no column of the data "
                    f"({', '.join(sorted(known))}); name one of these"
                )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, Any], None],
        **columns: Any,
    ) -> list[float | Fault]:
        """Ratings, scaled to 0 to 1; `reward/judge/rating` is the mean as the judge gave them."""
        names = [name for name in columns if name not in RESERVED_ARGUMENTS]
        scale = {"lowest": f"{self.config.lowest:g}", "highest": f"{self.config.highest:g}"}
        questions = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: columns[name][index] for name in names}
            shown = {**row, **scale, "prompt": as_text(prompt), "completion": as_text(completion)}
            questions.append(fill_in(self.config.question, shown))
        ratings = self._endpoint.ask_all(questions)
        log_metric("rating", [rating for rating in ratings if not isinstance(rating, Fault)])
        low, high = self.config.lowest, self.config.highest
        return [r if isinstance(r, Fault) else (r - low) / (high - low) for r in ratings]

    def _read(self, answer: str) -> float:
        """The last rating in the judge's words."""
        found = last_labelled("rating", RATING, answer)
        low, high = self.config.lowest, self.config.highest
        if found is None or not low <= float(found) <= high:
            raise UnreadableError(f"no line 'Rating: <a number from {low:g} to {high:g}>'")
        return float(found)


def fill_in(template: str, values: Mapping[str, Any]) -> str:
    """The template with the fields that have values; braces in values stay as they are, and unknown fields too."""
    return FIELD.sub(lambda found: str(values.get(found[1], found[0])), template)


def as_text(said: Any) -> str:
    """A prompt or completion as a judge reads it: a text, or a conversation with who says what."""
    if isinstance(said, str):
        return said
    if len(said) == 1:
        return str(said[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in said)
