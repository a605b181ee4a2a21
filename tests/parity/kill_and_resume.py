"""Kills a run again and again with SIGKILL, resumes it each time, and compares the end with the unbroken run.

    python tests/parity/kill_and_resume.py --kills 20 --config recipes/quickstart.yaml save_steps=5 max_steps=40
    python tests/parity/kill_and_resume.py --at-writes 1 --config tiny.yaml save_steps=1

By default the moments are random (seeded), every second one counted from the next checkpoint on, since tiny runs
spend most of their time in starting up; a run that ends before its kill is compared, and a new one begun. With
`--at-writes N` every N-th moment at which the run is about to rename, sync, create or delete something is tried.
Compared are the sha256 of every file in `final*/` and every line of metrics.jsonl (without timings) and
samples.jsonl. Each run is a process of its own, forked from this one, which has imported everything and computed
nothing. Exits with 0 if all ends were the same and some start was from a checkpoint.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

TIMINGS = ("timing_s/", "perf/")
WRITES = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def end_of(run: Path) -> dict:
    """What two runs must have in common: file -> sha256, and the lines of metrics and samples."""
    files = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("final*/**/*"))
        if path.is_file()
    }
    metrics = [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMINGS)}
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {"files": files, "metrics": metrics, "samples": (run / "samples.jsonl").read_bytes().decode()}


def differences(one: dict, two: dict) -> list[str]:
    """What is not the same, in words."""
    names = sorted(one["files"].keys() | two["files"].keys())
    found = [f"{name} differs" for name in names if one["files"].get(name) != two["files"].get(name)]
    found += [
        f"the metrics of step {i + 1} differ"
        for i, (a, b) in enumerate(zip(one["metrics"], two["metrics"], strict=False))
        if a != b
    ]
    found += ["the number of lines in metrics.jsonl differs"] * (len(one["metrics"]) != len(two["metrics"]))
    return found + ["samples.jsonl differs"] * (one["samples"] != two["samples"])


def start(words: list[str], log: Path, kill_at: int | None = None) -> int:
    """`meshift <words>` in a process of its own; returns its id. It kills itself at write number `kill_at`."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        from meshift.cli.main import main

        if kill_at is not None:
            count_writes(kill_at)
        code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_writes(kill_at: int) -> None:
    """From now on, die just before the `kill_at`-th change of the file system."""
    left = kill_at

    def counted(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))


def wait(child: int, seconds: float | None = None) -> int | None:
    """The exit status (negative: the signal); None if it has not ended after `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def wait_for_change(child: int, file: Path) -> int | None:
    """Wait until a file is there or is replaced; the exit status if the process ends first."""
    before = file.stat().st_ino if file.exists() else None
    while (status := wait(child, 0.001)) is None:
        if file.exists() and file.stat().st_ino != before:
            break
    return status


def kill_after(child: int, seconds: float, changed: Path | None = None) -> int:
    """Let it run that long, counted from the change of a file if there is one, then kill it; its exit status."""
    status = wait_for_change(child, changed) if changed is not None else None
    status = wait(child, seconds) if status is None else status
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = wait(child)
    return status


class Comparison:
    """One config, its unbroken run, and runs that are killed."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.words = words
        self.folder = folder
        self.log = folder / "log.txt"
        started = time.monotonic()
        self.num_kills = self.num_resumed = 0
        child = self.begin("unbroken")
        wait_for_change(child, folder / "unbroken" / "LATEST")
        saved = time.monotonic()
        self.unbroken = self.finish("unbroken", child)
        self.seconds, self.seconds_from_save = time.monotonic() - started, time.monotonic() - saved
        self.wrong: list[str] = []

    def begin(self, name: str, kill_at: int | None = None) -> int:
        """Start the run, or go on with it where it was killed."""
        run = self.folder / name
        self.num_resumed += (run / "LATEST").exists() and not (run / "final").exists()
        command, *options = self.words
        folder = f"output_dir={run}"
        return start([command, *options, folder, "--resume"], self.log, kill_at)

    def finish(self, name: str, child: int | None = None) -> dict:
        """Run to the end; what it left."""
        if child is None:
            child = self.begin(name)
        status = wait(child)
        if status != 0:
            raise SystemExit(f"the run ended with {status}:\n{self.log.read_text()[-3000:]}")
        return end_of(self.folder / name)

    def compare(self, name: str, end: dict, how: str) -> None:
        """Say whether the run ended as the unbroken one did, and drop it."""
        found = differences(self.unbroken, end)
        self.wrong += [f"{how}: {difference}" for difference in found]
        say(f"{how}: {'; '.join(found) or 'the same'}")
        shutil.rmtree(self.folder / name)

    def at_random(self, kills: int, draw: random.Random) -> None:
        """Kill at random moments, resuming in between, until there were that many."""
        while self.num_kills < kills:
            moments = []
            while self.num_kills < kills:
                saved = self.folder / "killed" / "LATEST" if self.num_kills % 2 == 0 else None
                seconds = draw.uniform(0, 0.7 * (self.seconds_from_save if saved else self.seconds))
                if kill_after(self.begin("killed"), seconds, saved) != -signal.SIGKILL:
                    break
                self.num_kills += 1
                moments.append(f"{seconds:.2f} s" + (" after a checkpoint" if saved else ""))
            how = f"killed after {', '.join(moments) or 'nothing'}"
            self.compare("killed", self.finish("killed"), how)

    def at_writes(self, stride: int) -> None:
        """Kill a fresh run at its first write, resume it, a fresh one at a later write, until one survives."""
        for number in range(1, 100_000, stride):
            status = wait(self.begin("killed", kill_at=number))
            if status != -signal.SIGKILL:
                break
            self.num_kills += 1
            self.compare("killed", self.finish("killed"), f"killed at write {number}")


def say(text: str) -> None:
    """Progress, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def import_everything() -> None:
    """What a run imports, so that a fork need not. Nothing may start a thread here."""
    import transformers  # noqa: F401

    import meshift.cli.main
    import meshift.cli.progress  # noqa: F401
    from meshift.cli.main import COMMANDS

    for name in ("sft", "reward", "dpo", "ppo"):
        if name in COMMANDS:
            COMMANDS[name].run.load()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", default="ppo", help="ppo, dpo, sft or reward")
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--at-writes", type=int, metavar="STRIDE")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    import_everything()
    words = [options.command, "--config", options.config, "save_steps=1", *options.overrides]
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(words, Path(folder))
        say(f"the unbroken run took {comparison.seconds:.1f} s")
        if options.at_writes is not None:
            comparison.at_writes(options.at_writes)
        else:
            comparison.at_random(options.kills, random.Random(options.seed))
    num_wrong = len(comparison.wrong)
    kills, resumed = comparison.num_kills, comparison.num_resumed
    say(f"{kills} kills, {resumed} starts from a checkpoint, {num_wrong} differences from the unbroken run")
    return 1 if num_wrong or kills == 0 or resumed == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
