"""Kills a run again and again with SIGKILL, resumes it each time, and compares the end with the unbroken run.

    python tests/parity/kill_and_resume.py --command ppo --config recipes/hh_ppo.yaml --kills 20 save_steps=5
    python tests/parity/kill_and_resume.py --command sft --config tiny.yaml --at-writes 1

By default the moments are random (seeded), every second one counted from the next checkpoint on, since tiny runs
spend most of their time in starting up; a run that ends before its kill is compared, and a new one begun. With
`--at-writes N` every N-th moment is tried at which the run is about to rename, sync, create or delete something,
or has just opened a file to write. Compared are the sha256 of every file in `final*/` and every line of
metrics.jsonl (without timings) and samples.jsonl. Printed are each kill with the checkpoint it left in LATEST,
each comparison, and the sums of all files. Each run is a process of its own, forked from this one, which has
imported everything and computed nothing. Exits with 0 if all ends were the same and some start was from a
checkpoint.
"""

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

TIMINGS = ("timing_s/", "start_s/", "perf/")
WRITES = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def end_of(run: Path) -> dict:
    """What two runs must have in common: file -> sha256, and the lines of metrics and samples."""
    files = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.glob("final*/**/*"))
        if path.is_file()
    }
    metrics = [
        {key: value for key, value in json.loads(line).items() if not is_time(key)}
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return {"files": files, "metrics": metrics, "samples": (run / "samples.jsonl").read_bytes().decode()}


def is_time(key: str) -> bool:
    """Whether the metric is of the machine's speed: `timing_s/*`, `sync/verify_seconds`, ..."""
    return key.startswith(TIMINGS) or (key.startswith("sync/") and key.endswith("seconds"))


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
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_writes(kill_at: int) -> None:
    """From now on, die at the `kill_at`-th change of the file system: before it, or with a file just opened."""
    left = kill_at

    def count():
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function):
        def call(*arguments, **options):
            count()
            return function(*arguments, **options)

        return call

    def opened(file, mode="r", *arguments, **options):
        result = open_file(file, mode, *arguments, **options)
        if set(mode) & set("wax+"):
            count()
        return result

    for name in WRITES:
        setattr(os, name, counted(getattr(os, name)))
    open_file, io.open = io.open, opened


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
    """One config, its unbroken run, and runs that are killed; says each kill as it comes."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.words = words
        self.folder = folder
        self.log = folder / "log.txt"
        started = time.monotonic()
        self.num_kills = self.num_resumed = self.num_ends = 0
        child = self.begin("unbroken")
        status = wait_for_change(child, folder / "unbroken" / "LATEST")
        saved = time.monotonic()
        self.unbroken = self.finish("unbroken", wait(child) if status is None else status)
        self.seconds, self.seconds_from_save = time.monotonic() - started, time.monotonic() - saved
        self.wrong: list[str] = []
        self.sums: dict[str, set[str]] = {name: set() for name in self.unbroken["files"]}

    def begin(self, name: str, kill_at: int | None = None) -> int:
        """Start the run, or go on with it where it was killed."""
        run = self.folder / name
        self.num_resumed += (run / "LATEST").exists() and not (run / "final").exists()
        command, *options = self.words
        folder = f"output_dir={run}"
        return start([command, *options, folder, "--resume"], self.log, kill_at)

    def finish(self, name: str, status: int | None = None) -> dict:
        """Run to the end, unless it has ended with a status; what it left."""
        if status is None:
            status = wait(self.begin(name))
        if status != 0:
            raise SystemExit(f"the run ended with {status}:\n{self.log.read_text()[-3000:]}")
        return end_of(self.folder / name)

    def killed(self, moment: str) -> None:
        """Say when the run was killed, and what it can go on from; one that was at its end does not count."""
        if (self.folder / "killed" / "final").exists():
            return
        self.num_kills += 1
        latest = self.folder / "killed" / "LATEST"
        say(f"{self.num_kills:>4}  {moment:<28}  {latest.read_text().strip() if latest.exists() else '-'}")

    def compare(self) -> None:
        """Run the killed run to its end, say whether that is the end of the unbroken one, and drop it."""
        end = self.finish("killed")
        found = differences(self.unbroken, end)
        self.num_ends += 1
        self.wrong += found
        for name, sha256 in end["files"].items():
            self.sums.setdefault(name, set()).add(sha256)
        say(f"      resumed to its end           {'; '.join(found) or 'the same bytes'}")
        shutil.rmtree(self.folder / "killed")

    def at_random(self, kills: int, draw: random.Random) -> None:
        """Kill at random moments, resuming in between, until there were that many."""
        while self.num_kills < kills:
            while self.num_kills < kills:
                saved = self.folder / "killed" / "LATEST" if self.num_kills % 2 == 0 else None
                seconds = draw.uniform(0, 0.7 * (self.seconds_from_save if saved else self.seconds))
                if kill_after(self.begin("killed"), seconds, saved) != -signal.SIGKILL:
                    break
                self.killed(f"{seconds:.2f} s after {'a checkpoint' if saved else 'its start'}")
            self.compare()

    def at_writes(self, stride: int) -> None:
        """Kill a fresh run at its first write, resume it, a fresh one at a later write, until one survives."""
        for number in range(1, 100_000, stride):
            status = wait(self.begin("killed", kill_at=number))
            if status != -signal.SIGKILL:
                break
            self.killed(f"at write {number}")
            self.compare()

    def say_sums(self) -> None:
        """One line for each file of the final models: its sha256, unbroken and after kills."""
        say(f"\n{'file':<36}  {'unbroken':<16}  after kills ({self.num_ends} ends)")
        for name, found in sorted(self.sums.items()):
            after = " ".join(sorted(sha256[:16] for sha256 in found))
            say(f"{name:<36}  {self.unbroken['files'].get(name, '-')[:16]:<16}  {after}")


def say(text: str) -> None:
    """Progress, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def import_everything() -> None:
    """What a run imports, so that a fork need not. Nothing may start a thread here."""
    import transformers.activations  # which a model's config brings with it
    import transformers.models.auto.tokenization_auto  # noqa: F401

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
    parser.add_argument("--folder", help="where the runs go, and are deleted; a new one in it (default: /tmp)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    started = time.monotonic()
    import_everything()
    words = [options.command, "--config", options.config, "save_steps=1", *options.overrides]
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-", dir=options.folder) as folder:
        comparison = Comparison(words, Path(folder))
        say(f"the unbroken run took {comparison.seconds:.1f} s\n\nkill  killed                        LATEST")
        if options.at_writes is not None:
            comparison.at_writes(options.at_writes)
        else:
            comparison.at_random(options.kills, random.Random(options.seed))
    comparison.say_sums()
    num_wrong = len(comparison.wrong)
    kills, resumed = comparison.num_kills, comparison.num_resumed
    seconds = time.monotonic() - started
    say(
        f"\n{kills} kills, {resumed} starts from a checkpoint, {num_wrong} differences from the unbroken run, "
        f"{seconds:.0f} s"
    )
    return 1 if num_wrong or kills == 0 or resumed == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
