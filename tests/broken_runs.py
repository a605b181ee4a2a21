"""Runs that are broken off, and what two runs must have in common at their ends."""

import json

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


def end_of(run):
    """Every file of the models, and all lines but timings."""
    files = {p.relative_to(run): p.read_bytes() for p in sorted(run.glob("final*/**/*")) if p.is_file()}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines]
    return files, rows, (run / "samples.jsonl").read_bytes()


def changed(config, **keys):
    return config.model_copy(update=keys)
