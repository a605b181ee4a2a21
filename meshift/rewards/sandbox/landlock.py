"""Landlock: of the files that are there, a program may read some folders and write one; TCP, and signals and
abstract sockets beyond its own domain, are closed to it as far as the kernel knows the rule.

It knows nothing of the other layers.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence

from meshift.rewards.sandbox.syscalls import system_call

WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_FILE = (
    1 << i for i in (1, 2, 3, 4, 5, 7, 8)
)
REFER, TRUNCATE = 1 << 13, 1 << 14
NUM_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by ABI; 16 from 5 on
READ = READ_FILE | READ_DIR
WORK = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_FILE | REFER | TRUNCATE
ONLY_ABI = 1
PATH_BENEATH = 1

Place = tuple[str, bool]  # a path, and whether it is a folder


def version() -> int:
    """The kernel's Landlock ABI, 0 where it has none."""
    try:
        return system_call("landlock_create_ruleset", 0, 0, ONLY_ABI)
    except OSError:
        return 0


def restrict(abi: int, readable: Sequence[Place], writable: Sequence[Place]) -> None:
    """Leave this thread only these files and folders, for good. Needs `no_new_privs`."""
    rights = (1 << NUM_FILE_RIGHTS.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 * (1 + (abi >= 4) + (abi >= 6))]
    ruleset = system_call("landlock_create_ruleset", ctypes.create_string_buffer(attributes), len(attributes), 0)
    for paths, allowed in ((readable, READ), (writable, WORK)):
        for path, is_folder in paths:
            of_kind = allowed if is_folder else allowed & (READ_FILE | WRITE_FILE | TRUNCATE)
            _add(ruleset, path, of_kind & rights)
    system_call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _add(ruleset: int, path: str, allowed: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed, place))
        system_call("landlock_add_rule", ruleset, PATH_BENEATH, rule, 0)
    finally:
        os.close(place)
