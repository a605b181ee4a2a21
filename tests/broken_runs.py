"""Runs that are broken off, and what two runs must have in common at their ends."""

import json
import os
import signal
from pathlib import Path

from meshift.runtime.observer import SilentObserver

TIMINGS = ("timing_s/", "perf/")
KEPT = {"max_steps": 5, "save_steps": 2, "report_to": []}


class Notes(SilentObserver):
    """Remembers messages, and breaks the run off after a step if told to."""

    def __init__(self, break_after=None, how=None):
        self.notes = []
        self.steps = []
        self.break_after = break_after
        self.how = how or KeyboardInterrupt()

    def on_message(self, text):
        self.notes.append(text)

    def on_step(self, step, metrics):
        self.steps.append(step)
        if step + 1 == self.break_after:
            raise self.how


class KillerObserver(SilentObserver):
    """Kills a process of the run, or stops it, once, when a call of a step begins."""

    def __init__(self, step, call, number=signal.SIGKILL):
        self.when, self.number, self.messages, self.done = (step, call), number, [], False

    def on_message(self, text):
        self.messages.append(text)

    def on_call(self, step, name):
        if (step, name) == self.when and not self.done:
            self.done = True
            os.kill(max(members()), self.number)


def members():
    """The processes of the gang: the children of the forkserver, but for the one that tracks resources."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            origin = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
            owner = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if "forkserver" in origin and "forkserver" in words and owner == os.getpid():
            found.append(int(folder.name))
    return found


def end_of(run):
    """Every file of the models, and all lines but timings."""
    files = {p.relative_to(run): p.read_bytes() for p in sorted(run.glob("final*/**/*")) if p.is_file()}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines]
    return files, rows, (run / "samples.jsonl").read_bytes()


def changed(config, **keys):
    return config.model_copy(update=keys)
