"""One model's side of a conversation: what was said, and the answer to what comes next, as it comes.

It knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshift.data.chat import Messages, encode, render
from meshift.errors import DataError
from meshift.generation.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from meshift.generation.engine import GenerationEngine
    from meshift.generation.params import SamplingParams

SHORTEST_MESSAGE = "Hi"


@dataclass(kw_only=True)
class Conversation:
    """A model, and the messages so far (the first may be of the role `system`).

    `num_forgotten` counts the oldest messages that the last answer was given without, for want of room.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    engine: GenerationEngine
    params: SamplingParams
    seed: int
    messages: Messages = field(default_factory=list)
    num_forgotten: int = 0
    num_answers: int = 0

    def reset(self, system: str | None) -> None:
        """Forget everything; begin with this system prompt, if there is one."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.num_forgotten = 0

    def check_room(self) -> None:
        """Raise `DataError` where no message at all would fit beside an answer of the longest kind."""
        needed = len(self._tokens([*self.messages, {"role": "user", "content": SHORTEST_MESSAGE}]))
        limit = self.engine.model.config.max_positions
        if needed + self.params.max_new_tokens <= limit:
            return
        if needed >= limit:
            raise DataError(
                f"the system prompt leaves no room for a message: with a short one it has {needed} tokens, and "
                f"{self.name} takes {limit}; shorten it"
            )
        raise DataError(
            f"--max-new-tokens {self.params.max_new_tokens} leaves no room for a message: {self.name} takes "
            f"{limit} tokens, and a short message with its system prompt has {needed}; give at most "
            f"{limit - needed}, better half of that"
        )

    def last_question(self) -> str | None:
        """Take back the last question with its answer; returns it, or None where nothing was asked."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        question = str(self.messages[asked[-1]]["content"])
        del self.messages[asked[-1] :]
        return question

    def answer(self, question: str) -> Iterator[str]:
        """The answer's text in pieces. Both are remembered, the answer as far as it came if it is broken off.

        Answers are drawn from the stream (seed, number of the answer). Raises `DataError` for a question that
        the chat template refuses or that is too long for the model; it is then not remembered.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = self._prompt(asked)
        text = TextStream(lambda tokens: str(self.tokenizer.decode(tokens, skip_special_tokens=True)))
        index, self.num_answers = self.num_answers, self.num_answers + 1
        tokens: list[int] = []
        try:
            for completion in self.engine.stream(prompt, self.params, seed=self.seed, index=index):
                tokens = completion.tokens
                yield text.grow(tokens)
            yield text.close(tokens)
        finally:
            if text.text:
                self.messages = [*asked, {"role": "assistant", "content": text.text}]

    def _prompt(self, messages: Messages) -> list[int]:
        """The token ids of as many of the newest messages as fit beside an answer, after the system prompt."""
        num_system = int(messages[0]["role"] == "system")
        room = self.engine.model.config.max_positions - self.params.max_new_tokens
        for start in range(num_system, len(messages), 2):
            tokens = self._tokens([*messages[:num_system], *messages[start:]])
            if len(tokens) <= room:
                self.num_forgotten = start - num_system
                return tokens
        raise DataError(
            f"the message has {len(tokens)} tokens with its system prompt, but {self.name} leaves room for {room} "
            f"beside --max-new-tokens {self.params.max_new_tokens}; shorten the message or lower that"
        )

    def _tokens(self, messages: Messages) -> list[int]:
        text = render(self.tokenizer, messages, "the conversation", add_generation_prompt=True)
        return encode(self.tokenizer, text)
