"""Writes docs/sandbox_attacks.md: every hostile program, and for escapes which layers stop it alone, as measured.

PYTHONPATH=.:tests/rewards/sandbox python tests/rewards/sandbox/attack_table.py > docs/sandbox_attacks.md

The wall stays up: with it down, root's escapes would be real ones (one of them mounts an empty disk over /tmp).
"""

import os
import socket
import sys
import tempfile

from hostile_bombs import BOMBS
from hostile_escapes import ESCAPES
from hostile_forgeries import FUNCTIONS, OUTPUTS

from meshift.rewards.code.judging import Judge
from meshift.rewards.code.problems import Problem
from meshift.rewards.sandbox.launching import Launch, best_wall
from meshift.rewards.sandbox.layers import LANDLOCK, LAYERS, LIMITS, NAMESPACES, PRIVILEGES, SECCOMP
from meshift.rewards.sandbox.slot import Slot

MEMORY = 128 * 2**20
ALONE = {
    "wall": (),
    "namespaces": (NAMESPACES,),
    "privileges": (NAMESPACES, PRIVILEGES),
    "limits": (LIMITS,),
    "Landlock": (LANDLOCK,),
    "seccomp": (SECCOMP,),
}
HEAD = """# The hostile programs

Written by `tests/rewards/sandbox/attack_table.py`. With all layers none of these passes, gets out or outlasts its
limits ([sandbox.md](sandbox.md)); tests run them all.

## Escapes

`x`: this layer stops it without the others (behind the wall, which is always up here; privileges with namespaces).
`outside`: it works as a plain process of the user that runs the tests, or of root, which a test shows.

| attack | outside | wall | namespaces | privileges | limits | Landlock | seccomp |
|---|---|---|---|---|---|---|---|"""


def stopped(slot, told, escape, layers):
    judge = Judge(layers=layers, timeout_s=1.0, memory_bytes=MEMORY)
    return not judge.judge(slot, Problem(inputs=[("", "ESCAPED")]), told + escape.program).passed


def escapes():
    slot = Slot(Launch(wall=best_wall()), MEMORY)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        names = {"CANARY": f"{folder}/canary", "PORT": listener.getsockname()[1], "RUN": os.getpid()}
        with open(names["CANARY"], "w", encoding="utf-8") as file:
            file.write("secret")
        told = "".join(f"{name} = {value!r}\n" for name, value in (names | {"PROJECT": __file__}).items())
        for escape in ESCAPES:
            assert stopped(slot, told, escape, LAYERS)
            wall = stopped(slot, told, escape, ())
            marks = [wall, *(not wall and stopped(slot, told, escape, up) for up in list(ALONE.values())[1:])]
            outside = "root" if escape.needs_root else "yes" if escape.works_outside else ""
            yield "| " + " | ".join([escape.what, outside, *("x" if mark else "" for mark in marks)]) + " |"
    slot.close()


def counted(rows):
    """What the table says in all: how many escapes the wall, one inner layer, or several stop alone."""
    marks = [["x" in mark for mark in row.split(" | ")[2:]] for row in rows]
    inner = [sum(row[1:]) for row in marks if not row[0]]
    one, none = inner.count(1), inner.count(0)
    more = len(inner) - one - none
    return (
        f"The wall stops {len(marks) - len(inner)} of {len(marks)}. Of the {len(inner)} others, {one} are stopped "
        f"by one layer alone, {more} by each of two or more, {none} only by layers together."
    )


def main():
    forgeries = [f"| {one.what} | {'fools' if one.fools_exit_codes else ''} |" for one in FUNCTIONS]
    table = list(escapes())
    lines = [
        HEAD,
        *table,
        f"\n{counted(table)} Where the wall does, the layers inside were not tried.",
        "\n## Bombs and programs without end\n",
        *(f"* {what}" for what in BOMBS),
        "\n## Forged verdicts of functions\n",
        "`fools`: a scorer that believes the exit code takes it for right.\n",
        "| forgery | |\n|---|---|",
        *forgeries,
        "\n## Forged outputs\n",
        *(f"* {what}" for what in OUTPUTS),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
