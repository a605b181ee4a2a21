r"""The texts of a preference row: prompt, chosen and rejected response, the prompt found where it is implicit.

It knows columns and the ways that public datasets fill them, and no tokens.
"""

from meshift.data.chat import Messages
from meshift.data.columns import answer, has, text_or_messages
from meshift.data.rows import Row
from meshift.data.transcripts import num_shared, shared_dialogue
from meshift.errors import DataError

Said = str | Messages


def split_pair(row: Row) -> tuple[Said, Said, Said]:
    r"""(prompt, chosen, rejected); the responses are alike, both texts or both messages. Raises DataError.

    Without `prompt` the prompt is what both have in common: leading messages of message lists; of HH dialogues
    all up to the last `\n\nAssistant:` they share; of other texts nothing (""). A prompt that both sides repeat,
    as some hub datasets do, is taken off them. Responses may be blank.
    """
    chosen, rejected = answer(row, "chosen"), answer(row, "rejected")
    prompt = text_or_messages(row, "prompt") if has(row, "prompt") else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts(prompt, chosen, rejected, row.where)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _messages(prompt, chosen, rejected, row.where)
    raise DataError(
        f"{row.where}: of 'chosen' and 'rejected' one is a text, one a list of messages: make them alike."
    )


def _texts(prompt: Said | None, chosen: str, rejected: str, where: str) -> tuple[Said, Said, Said]:
    if prompt is None:
        prompt = shared_dialogue(chosen, rejected, where)
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    if isinstance(prompt, str) and chosen.startswith(prompt) and rejected.startswith(prompt):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _messages(prompt: Said | None, chosen: Messages, rejected: Messages, where: str) -> tuple[Said, Said, Said]:
    if isinstance(prompt, str) and chosen[0]["role"] != "assistant":
        prompt = None  # it is what the first message says
    if prompt is None:
        shared = num_shared(chosen, rejected)
        if shared == 0:
            raise DataError(f"{where}: 'chosen' and 'rejected' share no first message: add a column 'prompt'.")
        return chosen[:shared], chosen[shared:], rejected[shared:]
    repeated = [side[: len(prompt)] == prompt and len(side) > len(prompt) for side in (chosen, rejected)]
    if isinstance(prompt, list) and all(repeated):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected
