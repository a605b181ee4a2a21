"""A prompt and what answers it, tokenised as generation leaves them: the prompt first, then the answer.

It knows the two ways to write either (a text, or messages for the chat template), and nothing of columns or files.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from meshift.data.chat import Conversation, Messages, Span, encode, encode_with_spans, tokens_inside
from meshift.data.columns import tools
from meshift.data.rows import Row
from meshift.data.transcripts import answers, is_transcript, opens_dialogue, transcript_messages
from meshift.data.turns import assistant_turns
from meshift.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Exchange:
    r"""Texts. Example: `Exchange(prompt="\n\nHuman: Hi\n\nAssistant:", response=" Hello", where="hh.jsonl:1")`.

    `said`: prompt and response together, where a chat template has rendered them and so has written the special
    tokens out; None where they are the row's own texts.
    """

    prompt: str
    response: str
    where: str
    said: Conversation | None = None


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How a run turns texts into tokens.

    `append_eos`: responses are complete, so each ends in an end token exactly once; False is for texts that were
    cut somewhere. `stop_token_ids` are the ids that end a completion in generation, besides EOS: a response that
    the template ends with one of them needs no EOS behind it. `apply_chat_template`: texts become messages, HH
    dialogues turn by turn, any other prompt as what a user says.
    """

    tokenizer: PreTrainedTokenizerBase
    append_eos: bool = True
    apply_chat_template: bool = False
    stop_token_ids: tuple[int, ...] = field(default=())

    def check(self, dataset_name: str) -> None:
        """Raise `DataError` where EOS is to be appended and the tokenizer has none."""
        if self.append_eos and self.tokenizer.eos_token is None:
            raise DataError(
                f"{dataset_name}: data.append_eos is on, but the tokenizer has no end-of-sequence token: set "
                "data.append_eos=false, or eos_token in the model's tokenizer_config.json."
            )

    def exchange(self, prompt: str | Messages, response: str | Messages, row: Row) -> Exchange:
        """Both as texts. Messages anywhere make messages of both; a prompt "" is none."""
        if isinstance(prompt, str) and isinstance(response, str) and not self.apply_chat_template:
            return Exchange(prompt=prompt, response=response, where=row.where)
        asked = self.asked(prompt, row)
        said = asked.then(self._answer(response, asked) if isinstance(response, str) else response)
        opening = asked.opening(self.tokenizer)
        whole = said.render(self.tokenizer, add_generation_prompt=False)
        if not whole.startswith(opening):
            raise DataError(
                f"{row.where}: the response does not follow the prompt in the chat template's text, which opens "
                f"it with {opening[-30:]!r}: part prompt and response at an assistant message, written so."
            )
        return Exchange(prompt=opening, response=whole[len(opening) :], where=row.where, said=said)

    def asked(self, prompt: str | Messages, row: Row) -> Conversation:
        """The prompt as a conversation: a text as `apply_chat_template` has it.

        It goes on where its last words are the assistant's, in a text or in the row's own messages `prompt`;
        messages that two answers share, or that stand before the last of `messages`, are complete. Raises
        DataError where there is no message, or one that cannot be gone on with.
        """
        messages = self._prompt_messages(prompt) if isinstance(prompt, str) else prompt
        if not messages:
            raise DataError(
                f"{row.where}: there is no prompt to begin the conversation with: add a column 'prompt'."
            )
        is_given = isinstance(prompt, str) or isinstance(row.values.get("prompt"), list)
        goes_on = is_given and messages[-1]["role"] == "assistant"
        if goes_on and messages[-1].get("tool_calls"):
            raise DataError(
                f"{row.where}: 'prompt' ends with a call of a tool, which nobody answers: add the tool's message."
            )
        return Conversation(messages=messages, where=row.where, tools=tools(row), goes_on=goes_on)

    def _prompt_messages(self, text: str) -> Messages:
        if opens_dialogue(text):
            return transcript_messages(text)
        return [{"role": "user", "content": text}] if text else []

    def _answer(self, text: str, asked: Conversation) -> Messages:
        """What a text response is among messages: one of the assistant's."""
        if self.apply_chat_template:
            # A text that was written to follow a text begins with the blank between them; within a message that
            # blank is needed, once.
            has_blank = not asked.goes_on or asked.messages[-1]["content"][-1].isspace()
            text = text.strip() if has_blank else text.rstrip()
        return [{"role": "assistant", "content": text}]

    def prompt_tokens(self, exchange: Exchange) -> list[int]:
        """The prompt as generation sees it: a text gets the tokenizer's BOS, a template has written its own."""
        return encode(self.tokenizer, exchange.prompt, opening=exchange.said is None)

    def response_tokens(self, exchange: Exchange) -> list[int]:
        """The response, tokenised by itself as it was generated, with its end."""
        text, end = self._ending(exchange.response)
        return encode(self.tokenizer, text) + end

    def assistant_mask(self, exchange: Exchange) -> tuple[list[int], list[bool]]:
        """Prompt and response tokens, and which the assistant has said, in the prompt too; an end is said."""
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{exchange.where}: loss_on=assistant needs a tokenizer that knows its tokens' characters (a "
                "`tokenizer.json`): use loss_on=completion."
            )
        text, end = self._ending(exchange.response)
        spans = self._spans(exchange)
        plain = exchange.said is None
        tokens, offsets = encode_with_spans(self.tokenizer, exchange.prompt, opening=plain)
        said, said_offsets = encode_with_spans(self.tokenizer, text)
        shift = len(exchange.prompt)
        offsets += [(first + shift, last + shift) for first, last in said_offsets]
        return tokens + said + end, tokens_inside(offsets, spans) + [True] * len(end)

    def _spans(self, exchange: Exchange) -> list[Span]:
        whole = exchange.prompt + exchange.response
        if exchange.said is not None:
            return assistant_turns(self.tokenizer, exchange.said, whole)
        if is_transcript(whole):
            return answers(whole)
        return [(len(exchange.prompt), len(whole))]

    def _ending(self, text: str) -> tuple[str, list[int]]:
        """The text to tokenise, and the EOS to put behind it: none where the text has an end already."""
        if not self.append_eos:
            return text, []
        eos = self.tokenizer.eos_token_id
        stops = [self.tokenizer.decode([stop]) for stop in {*self.stop_token_ids, eos}]
        if text.rstrip().endswith(tuple(stops)):
            return text.rstrip(), []
        return text, [eos]
