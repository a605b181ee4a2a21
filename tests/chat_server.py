"""Servers on this machine that speak OpenAI's chat completions, with answers that a test gives."""

from functools import partial

from local_server import local_servers


def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def chat_servers(monkeypatch):
    """For a fixture: `serve(answer)` -> a server that says `answer(question)`: a text, (status, body), or
    None to hang."""
    with local_servers(monkeypatch, "/v1") as start:
        yield lambda answer: start(partial(_act, answer))


def _act(answer, handler, question):
    said = answer(question)
    if said is None:
        handler.server.released.wait(30)
        return
    status, body = said if isinstance(said, tuple) else (200, chat(said))
    handler.say(status, body)
