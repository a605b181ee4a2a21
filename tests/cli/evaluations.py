"""What tests of `meshift eval` share: small files of questions, a command on them, and what it found."""

import json

QUESTIONS = [
    {"question": f"the film was {word} and I liked it", "answer": f"It was.\n#### {i}"}
    for i, word in enumerate(("good", "bad", "great", "dull"))
]
DIALOGUES = [
    {
        "chosen": f"\n\nHuman: {word}\n\nAssistant: it was good",
        "rejected": f"\n\nHuman: {word}\n\nAssistant: it was bad and dull",
    }
    for word in ("the film", "a story", "it")
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(model, *more, data="gsm8k.jsonl"):
    return ["--task", "gsm8k", "--data", data, "--model", model, "--max-new-tokens", 6, *more]


def results(folder="eval-gsm8k"):
    with open(f"{folder}/results.json", encoding="utf-8") as file:
        return json.load(file)
