"""docs/coming_from_*.md taken apart: the files and commands that they show, and the rows of their tables."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
KEY = re.compile(r"[a-z_0-9]+(\[\])?(\.[a-z_0-9]+(\[\])?)*(: \S+)?")


@dataclass(frozen=True)
class Row:
    """One line of a table with a column `Meshift`: their names, our cell, and our default if one is given."""

    page: str
    theirs: tuple[str, ...]
    ours: str
    default: str | None

    @property
    def keys(self):
        """Our keys, perhaps with a value: `data.loss_on: all`."""
        return [code for code in CODE.findall(self.ours) if KEY.fullmatch(code)]


class Page:
    def __init__(self, name):
        self.name = name
        self.text = (DOCS / f"coming_from_{name}.md").read_text(encoding="utf-8")
        self.blocks = [(language, title, body) for language, title, body in BLOCK.findall(self.text)]

    def write_files(self, folder):
        """Every block that has a file's name."""
        for _, title, body in self.blocks:
            if "." in title:
                (folder / title).write_text(body, encoding="utf-8")

    def commands(self):
        """Our commands, as lists of words without `meshift`."""
        lines = "\n".join(body for _, title, body in self.blocks if title == "run").splitlines()
        return [shlex.split(line)[1:] for line in lines if line.strip()]

    def rows(self):
        """The rows of all key tables."""
        header: list[str] = []
        for line in self.text.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not line.startswith("|"):
                header = []
            elif not header:
                header = cells
            elif "there → here" in header and set(cells) != {"---"}:
                place = header.index("Meshift")
                defaults = cells[header.index("there → here")]
                here = defaults.partition("→")[2].strip() if "→" in defaults else None
                theirs = tuple(CODE.findall(" ".join(cells[:place])))
                yield Row(self.name, theirs, cells[place], here)

    def settings(self):
        """What their script or command sets, one dictionary per script: name -> value."""
        for language, title, body in self.blocks:
            if title.startswith("train_") and language == "python":
                yield dict(_arguments_of_config(body))
            elif language == "bash" and title != "run":
                words = shlex.split(body.replace("\\\n", " "))[3:]
                yield dict(_flags(words) if words[0].startswith("--") else (w.split("=", 1) for w in words))

    def configs(self):
        """Our YAML files, in the order of `settings`."""
        return [yaml.safe_load(body) for language, _, body in self.blocks if language == "yaml"]


def _arguments_of_config(script):
    calls = [n for n in ast.walk(ast.parse(script)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    config = next(call for call in calls if call.func.id.endswith("Config"))
    return ((keyword.arg, ast.literal_eval(keyword.value)) for keyword in config.keywords)


def _flags(words):
    for i, word in enumerate(words):
        if word.startswith("--"):
            following = words[i + 1] if i + 1 < len(words) else "--"
            yield word, True if following.startswith("--") else following


def value_at(config, key):
    """The value under a dotted key, or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def plain(value):
    """Numbers, truths and words in one spelling, whoever wrote them."""
    value = yaml.safe_load(value) if isinstance(value, str) else value
    try:
        return float(value) if not isinstance(value, bool) else value
    except (TypeError, ValueError):
        return value
