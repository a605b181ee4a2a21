"""`meshift chat`: what is piped in is answered as `meshift generate --chat` would, and remembered."""

import io
import json
import re
import sys

import pytest

from meshift.cli import chat as chat_module
from meshift.cli.main import main

OPTIONS = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture
def say(tiny_model, monkeypatch, capsys):
    """`say("line", ..., options=(...))` -> (exit code, stdout, stderr) of a chat with these lines."""

    def call(*lines, options=OPTIONS, model=tiny_model):
        stdin = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        code = main(["chat", "--model", str(model), *options])
        return code, *capsys.readouterr()

    return call


def greedy(folder, prompt, capsys):
    """What the model says to a text that is the template's own."""
    words = ["--model", str(folder), "--prompt", prompt, "--max-new-tokens", "12"]
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out.removesuffix("\n").strip()


def test_an_answer_is_what_the_model_says_to_its_template(say, tiny_model, capsys):
    code, out, err = say("the film was good")
    assert (code, err) == (0, "")
    assert out.strip() == greedy(tiny_model, "user the film was good <eos> assistant", capsys)


def test_the_conversation_is_remembered_and_reset(say, tiny_model, tmp_path):
    file = tmp_path / "chats.jsonl"
    save = f"/save {file}"
    code, _, err = say(
        "a film", "I liked it", save, "/reset", "a story", save, options=(*OPTIONS, "--system", "bad")
    )
    assert code == 0, err
    first, second = (json.loads(line)["messages"] for line in file.read_text().splitlines())
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in first if m["role"] == "user"] == ["a film", "I liked it"]
    assert [(m["role"], m["content"]) for m in second][:2] == [("system", "bad"), ("user", "a story")]


def test_a_second_message_is_answered_with_the_first_in_mind(say, tiny_model, tmp_path, capsys):
    file = tmp_path / "chats.jsonl"
    _, out, _ = say("a film", "I liked it", f"/save {file}")
    messages = json.loads(file.read_text())["messages"]
    history = "".join(f"{m['role']} {m['content']} <eos> " for m in messages[:-1])
    assert out.splitlines()[-1].strip() == greedy(tiny_model, f"{history}assistant", capsys)


def test_another_answer_replaces_the_last(say, tmp_path):
    file = tmp_path / "chats.jsonl"
    drawn = ("--temperature", "1.5", "--max-new-tokens", "8")
    _, out, _ = say("a film", "/retry", f"/save {file}", options=drawn)
    messages = json.loads(file.read_text())["messages"]
    assert len(out.splitlines()) == 2
    assert out.splitlines()[0] != out.splitlines()[1]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[1]["content"].strip() == out.splitlines()[1].strip()


def test_two_models_answer_the_same_message(say, tiny_model, tmp_path):
    file = tmp_path / "chats.jsonl"
    _, out, _ = say("a film", f"/save {file}", options=(*OPTIONS, "--compare", str(tiny_model)))
    assert out.count(f"--- {tiny_model}\n") == 2
    assert len(set(out.split(f"--- {tiny_model}\n")[1:])) == 1, "the same model says the same"
    assert len(file.read_text().splitlines()) == 2


def test_what_no_longer_fits_is_left_out_and_said_so(say):
    """The model has 128 positions, and a message of 30 words with its answer takes about 44."""
    code, _, err = say(*["the film was good " * 7 for _ in range(4)])
    assert code == 0
    assert re.search(r"answered without the oldest [24] messages", err)


def test_a_line_that_ends_in_a_backslash_goes_on_in_the_next(say, tmp_path):
    file = tmp_path / "chats.jsonl"
    say("a film\\", "and a story", "", f"/save {file}")
    assert json.loads(file.read_text())["messages"][0]["content"] == "a film\nand a story"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["/rest"], "unknown command `/rest`; did you mean `/reset`?"),
        (["/save"], "/save needs a file"),
        (["/save /no/such/folder/x.jsonl"], "cannot write /no/such/folder/x.jsonl"),
        (["/retry"], "there is nothing to try again"),
        (["the film " * 100], "the message has"),
    ],
)
def test_a_mistake_in_piped_lines_ends_the_chat_with_its_sentence(say, lines, expected):
    code, out, err = say(*lines, "a film")
    assert (code, out) == (2, "")
    assert err.startswith(f"meshift: {expected}")
    assert err.count("\n") == 1


def test_piped_bytes_that_are_no_text_are_refused(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\n"), encoding="utf-8"))
    assert main(["chat", "--model", str(tiny_model)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--max-new-tokens", "500"), "--max-new-tokens 500 leaves no room for a message"),
        (("--system", "the film " * 100), "the system prompt leaves no room for a message"),
    ],
)
def test_options_that_leave_no_room_are_refused_before_the_first_message(say, options, expected):
    code, out, err = say(options=options)
    assert (code, out) == (2, "")
    assert err.startswith(f"meshift: {expected}")
    assert err.count("\n") == 1


def test_the_room_that_is_said_to_be_there_is(say):
    _, _, err = say(options=("--max-new-tokens", "500"))
    most = int(re.search(r"give at most (\d+)", err)[1])
    assert say("a", options=("--max-new-tokens", str(most)))[0] == 0
    assert say(options=("--max-new-tokens", str(most + 1)))[0] == 2


def test_a_reward_model_is_no_partner_and_its_user_is_told_whom_to_ask(say, tiny_reward):
    code, out, err = say("a film", model=tiny_reward)
    assert (code, out) == (2, "")
    assert "is a reward model or a critic" in err
    assert "give the language model that it came from" in err


def test_a_model_without_a_template_is_sent_to_generate(say, tiny_model, tmp_path):
    import shutil

    folder = tmp_path / "plain"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    code, _, err = say("a", model=folder)
    assert code == 2
    assert "use `meshift generate`" in err


class Keyboard:
    """A terminal's input: lines, and Ctrl-C at some of them."""

    def __init__(self, *typed):
        self._typed = iter(typed)

    def __call__(self, prompt):
        line = next(self._typed, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line


@pytest.fixture
def terminal(tiny_model, monkeypatch, capsys):
    def call(*typed):
        monkeypatch.setattr(chat_module, "_read", Keyboard(*typed))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        code = main(["chat", "--model", str(tiny_model), *OPTIONS])
        return code, *capsys.readouterr()

    return call


def test_in_a_terminal_a_mistake_does_not_end_the_chat(terminal):
    code, out, err = terminal("/rest", KeyboardInterrupt, "a film", "/quit", "never read")
    assert code == 0
    assert "did you mean `/reset`?" in err
    assert "/quit leaves" in out
    assert "never read" not in out


def test_ctrl_c_stops_an_answer_and_not_the_chat(terminal, monkeypatch, tmp_path):
    from meshift.generation.engine import GenerationEngine

    whole = GenerationEngine.stream

    def interrupted(self, prompt, params, *, seed, index=0):
        for num_tokens, completion in enumerate(whole(self, prompt, params, seed=seed, index=index), start=1):
            if index == 0 and num_tokens == 3:
                raise KeyboardInterrupt
            yield completion

    monkeypatch.setattr(GenerationEngine, "stream", interrupted)
    file = tmp_path / "chats.jsonl"
    code, out, _ = terminal("a film", "I liked it", f"/save {file}")
    assert code == 0
    assert "[stopped]" in out
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert len(messages[1]["content"]) < len(messages[3]["content"]), "what came of the stopped answer is kept"


def test_a_text_cannot_steer_the_terminal():
    assert chat_module.visible("\x1b[2J\x07ok\n\t\x9b1mé") == "␛[2J␇ok\n\t␡1mé"
