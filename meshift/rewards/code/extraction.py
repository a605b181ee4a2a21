"""The program in a completion: the last code block of an answer, or the whole text.

It reads text alone: nothing a model wrote is parsed or compiled on this side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

FENCE = "```"
LANGUAGES = ("python", "py", "python3")
END_OF_THOUGHT = "</think>"
FIRST = "from __future__ import"  # nothing may stand before it
WORD = re.compile(r"[A-Za-z_]\w*")
NEXT_PART = re.compile(r"\n(?:class |def |#|print\(|if |@|```|<)")
"""Where a completion of a function's body has left the body: the stop sequences of HumanEval's paper and a few
more."""


def extract_code(completion: str, names: Sequence[str] = ()) -> str:
    """The last block marked as Python, else the last block, else everything; what came before `</think>` is left
    out. Where blocks of that kind define one of `names`, the last of these: behind it stands how it is used.

    A block that the length limit cut off counts up to its end.
    """
    answer = completion.rpartition(END_OF_THOUGHT)[2]
    blocks = _blocks(answer)
    if not blocks:
        return answer
    marked = [code for language, code in blocks if language in LANGUAGES] or [code for _, code in blocks]
    defined = rf"(?:async +)?(?:def|class) +(?:{'|'.join(map(re.escape, names))})\b"
    wanted = re.compile(rf"^[ \t]*{defined}", re.MULTILINE)
    defining = [code for code in marked if names and wanted.search(code)]
    return (defining or marked)[-1]


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every block, line by line: a regular expression takes hours for some texts."""
    found: list[tuple[str, list[str]]] = []
    is_open = False
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if stripped.startswith(FENCE):
            is_open = not is_open
            if is_open:
                found.append((stripped.removeprefix(FENCE).strip().partition(" ")[0].lower(), []))
        elif is_open:
            found[-1][1].append(line)
    return [(language, "".join(lines)) for language, lines in found]


def complete_function(opening: str, name: str, completion: str, *, cut: bool = True) -> str:
    """The program that a completion makes of `opening`, a function's head as HumanEval gives it.

    A completion that defines the function stands after the opening, whose imports and helpers it may use; one that
    goes on with the body is cut where the body ends, unless `cut` says that whoever drew it has seen to that.
    """
    code = extract_code(completion, (name,))
    if re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE):
        return f"{opening}\n{code}"
    end = NEXT_PART.search(code) if cut else None
    return opening + (code[: end.start()] if end else code)


def import_names(modules: Mapping[str, Sequence[str]], code: str) -> str:
    """Import statements for those of the modules, and of their names, that a program has as words.

    Each costs a program time, so what it does not have is left out.
    """
    if not modules or FIRST in code:
        return ""
    words = set(WORD.findall(code))
    lines = [f"import {module}\n" for module in modules if module in words]
    for module, names in modules.items():
        if used := [name for name in names if name in words]:
            lines.append(f"from {module} import {', '.join(used)}\n")
    return "".join(lines)
