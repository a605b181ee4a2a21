"""`meshift chat`: talk to one model, or to two at once, in the terminal.

It knows nothing of training. torch is imported when the options have been found right.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshift.cli.command import Command, UsageError, did_you_mean
from meshift.cli.counting import counts_shown
from meshift.cli.generate import add_sampling_options, dtype_named, sampling_params
from meshift.errors import DataError, InputError

if TYPE_CHECKING:
    from meshift.cli.conversation import Conversation

LONGEST_ANSWER = 512
HELP = """\
/reset          forget the conversation; the system prompt stays
/system TEXT    forget the conversation and begin with another system prompt (none: without one)
/retry          another answer to the last message
/save FILE      append the conversation to FILE, as a row of `messages` that `meshift sft` reads
/help           this list
/quit           leave; Ctrl-D leaves too
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model folder, hub id, or pypi:<name>")
    add("--compare", metavar="DIR", help="a second model, which answers the same messages")
    add("--system", metavar="TEXT", help="system prompt")
    add_sampling_options(parser, temperature=0.7)
    add(
        "--max-new-tokens", type=int, metavar="N", help=f"of an answer; default {LONGEST_ANSWER}, if there is room"
    )


def _run(args: argparse.Namespace) -> int:
    sampling_params(args, args.max_new_tokens or LONGEST_ANSWER)  # wrong options are found before models are read
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {args.max_new_tokens}; give at least 1")
    conversations = [_open(args, name) for name in (args.model, args.compare) if name]
    for conversation in conversations:
        conversation.reset(args.system)
        conversation.check_room()
    chat = Chat(conversations, system=args.system, interactive=sys.stdin.isatty())
    chat.run()
    return 0


def _open(args: argparse.Namespace, name: str) -> Conversation:
    import dataclasses

    from meshift.cli.conversation import Conversation
    from meshift.generation.engine import GenerationEngine
    from meshift.models.hf.load import load_config
    from meshift.runtime.conversion import head_of
    from meshift.runtime.models import model_folder, open_model, open_tokenizer, stop_token_ids

    tokenizer = open_tokenizer(name)
    folder = model_folder(name)
    if head_of(folder, load_config(folder)) == "reward":
        raise UsageError(
            f"{name} is a reward model or a critic: it scores texts and writes none; give the language model that "
            "it came from"
        )
    if not tokenizer.chat_template:
        raise UsageError(
            f"{name} has no chat template, so it cannot tell who speaks; use `meshift generate` for plain text"
        )
    with counts_shown():
        model = open_model(name, "lm", dtype_named(args.dtype))
    engine = GenerationEngine(model, num_slots=1)
    # Half of a short model's positions is left to the conversation.
    longest = args.max_new_tokens or min(LONGEST_ANSWER, engine.model.config.max_positions // 2)
    params = dataclasses.replace(sampling_params(args, longest), stop_token_ids=stop_token_ids(name, tokenizer))
    return Conversation(name=name, tokenizer=tokenizer, engine=engine, params=params, seed=args.seed)


class Chat:
    """Lines in, answers out, until `/quit` or the end of the input.

    In a terminal a mistake is said and the chat goes on; with piped input it ends the command.
    """

    def __init__(self, conversations: Sequence[Conversation], *, system: str | None, interactive: bool) -> None:
        self._conversations = conversations
        self._system = system
        self._interactive = interactive
        self._commands = {
            "reset": lambda rest: self._reset(self._system),
            "system": self._reset,
            "retry": self._retry,
            "save": self._save,
            "help": lambda rest: print(HELP),
        }

    def run(self) -> None:
        """Talk."""
        if self._interactive:
            _enable_line_editing()
            print(f"{' and '.join(c.name for c in self._conversations)}; /help lists the commands, /quit leaves")
        for line in self._lines():
            if line in ("/quit", "/exit"):
                return
            try:
                self._obey(line)
            except InputError as error:
                if not self._interactive:
                    raise
                _note(str(error))

    def _lines(self) -> Iterator[str]:
        """What is typed, without blank lines; a line that ends in a backslash goes on in the next."""
        begun = ""
        while True:
            try:
                line = _read("... " if begun else "you> ") if self._interactive else _read_piped()
            except EOFError:
                break
            except KeyboardInterrupt:  # at the prompt: the line is thrown away, as a shell does
                print("\n/quit leaves")
                begun = ""
                continue
            begun += line
            if begun.endswith("\\"):
                begun = begun[:-1] + "\n"
                continue
            if begun.strip():
                yield begun.strip()
            begun = ""
        if begun.strip():
            yield begun.strip()

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            self._ask(line)
            return
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            hint = did_you_mean(f"/{name}", [f"/{known}" for known in self._commands]) or "/help lists them"
            raise UsageError(f"unknown command `/{name}`; {hint}")
        self._commands[name](rest.strip())

    def _ask(self, question: str) -> None:
        for conversation in self._conversations:
            if len(self._conversations) > 1:
                print(f"--- {conversation.name}")
            self._answer(conversation, question)

    def _answer(self, conversation: Conversation, question: str) -> None:
        pieces = conversation.answer(question)
        try:
            for piece in pieces:
                print(visible(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            print(" [stopped]", end="")
        finally:
            pieces.close()  # type: ignore[attr-defined]
        print(flush=True)
        if conversation.num_forgotten:
            _note(
                f"{conversation.name} answered without the oldest {conversation.num_forgotten} messages, "
                "which it has no room for; /reset begins anew"
            )

    def _reset(self, system: str | None) -> None:
        self._system = system
        for conversation in self._conversations:
            conversation.reset(system)
        if self._interactive:
            _note("the conversation begins anew")

    def _retry(self, rest: str) -> None:
        del rest
        questions = [conversation.last_question() for conversation in self._conversations]
        if questions[0] is None:
            raise UsageError("there is nothing to try again; write a message first")
        self._ask(questions[0])

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs a file: /save chats.jsonl")
        path = Path(name).expanduser()
        rows = [{"model": c.name, "messages": c.messages} for c in self._conversations if c.messages]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise ChatFileError(f"cannot write {path} ({error.strerror}); /save to another file") from None
        _note(f"saved to {path}, {len(rows)} row{'s' * (len(rows) != 1)} more")


class ChatFileError(InputError):
    """A conversation cannot be saved where the user said."""


def visible(text: str) -> str:
    """The text with control characters drawn as pictures: a model must not move the cursor."""
    return CONTROL_CHARACTERS.sub(lambda found: chr(0x2400 + ord(found[0])) if found[0] < " " else "\u2421", text)


def _read(prompt: str) -> str:
    return input(prompt)


def _read_piped() -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(f"what is piped in is not UTF-8 ({error.reason}); save it as UTF-8") from None
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  (importing it gives `input` history and arrow keys)
    except ModuleNotFoundError:  # Windows: the terminal has its own
        return


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


CHAT = Command(
    name="chat",
    summary="talk to a model in the terminal",
    description=(
        "Talk to a model in the terminal; its answers come as they are drawn. With --compare a second\n"
        f"model answers the same messages. Lines can be piped in.\n\n{HELP}"
    ),
    example='meshift chat --model runs/ppo/final --compare pypi:smollm2-135m-instruct --system "Be brief."',
    configure=_configure,
    run=_run,
)
