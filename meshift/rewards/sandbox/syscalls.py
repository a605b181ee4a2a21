"""System calls that Python has no function for, made through ctypes, and the numbers of those that are let
through.

Linux on x86_64 and aarch64. It knows nothing of what they are used for.
"""

from __future__ import annotations

import ctypes
import os
import platform

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machines that the numbers below are known for, with the kernel's AUDIT_ARCH of each."""

# name -> (x86_64, aarch64); None where a machine has no such call. Sources: the kernel's
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "ioctl": (16, 29), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None),
    "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172),
    "sendfile": (40, 71), "clone": (56, 220), "exit": (60, 93), "kill": (62, 129), "uname": (63, 160),
    "fcntl": (72, 25), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45),
    "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "unlink": (87, None),
    "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "getpgrp": (111, None), "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150),
    "getpgid": (121, 155), "getsid": (124, 156), "capget": (125, 90), "capset": (126, 91),
    "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44), "prctl": (157, 167),
    "arch_prctl": (158, None), "gettid": (186, 178), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "set_tid_address": (218, 96), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21), "tgkill": (234, 131),
    "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "utimensat": (280, 88), "epoll_pwait": (281, 22),
    "fallocate": (285, 47), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "preadv": (295, 69), "pwritev": (296, 70), "prlimit64": (302, 261),
    "renameat2": (316, 276), "getrandom": (318, 278), "membarrier": (324, 283), "copy_file_range": (326, 285),
    "statx": (332, 291), "rseq": (334, 293), "clone3": (435, 435), "close_range": (436, 436),
    "faccessat2": (439, 439), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "pivot_root": (155, 41), "mount_setattr": (442, 442),
}  # fmt: skip


def number_of(name: str) -> int | None:
    """The call's number on this machine, or None where it has none."""
    return NUMBERS[name][list(ARCHITECTURES).index(platform.machine())]


# PyDLL keeps Python's lock: between `clone` and the child's first steps no other thread may run.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def system_call(name: str, *arguments: object) -> int:
    """Call it with integers and buffers. Raises `OSError`."""
    number = number_of(name)
    if number is None:
        raise OSError(f"{platform.machine()} has no system call {name}")
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(int(_libc.syscall(ctypes.c_long(number), *wide)), name)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2). Raises `OSError` naming the target."""
    texts = [t if t is None else t.encode() for t in (source, target, kind, options)]
    _checked(_libc.mount(texts[0], texts[1], texts[2], flags, texts[3]), f"mount on {target}")


def unmount(target: str, flags: int) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(target.encode(), flags), f"unmount {target}")


def unshare(flags: int) -> None:
    """unshare(2): leave namespaces for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def control_process(option: int, *arguments: object) -> int:
    """prctl(2), missing arguments being 0."""
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    wide += [ctypes.c_ulong(0)] * (4 - len(wide))
    return _checked(_libc.prctl(option, *wide), f"prctl {option}")


def clone(flags: int) -> int:
    """Like `os.fork`, the child in the new namespaces that `flags` name. Only for processes of one thread."""
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = int(_libc.syscall(ctypes.c_long(number_of("clone") or 0), ctypes.c_long(flags | 17), 0, 0, 0, 0))
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    failed = ctypes.get_errno()
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(failed, f"clone: {os.strerror(failed)}")
    return pid


def drop_from_bounding_set(last: int) -> None:
    """Take capabilities 0 to `last` out of what this process can ever have."""
    for capability in range(last + 1):
        if _libc.prctl(24, capability, 0, 0, 0) < 0:  # PR_CAPBSET_DROP
            _checked(-1, f"drop capability {capability}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
