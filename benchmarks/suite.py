"""Runs works one after another: our process and a peer's side by side, a duel for each of the peer's settings.

It knows how sides are started and what they are given; what they do is theirs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.contestant import Contestant, ContestantError
from benchmarks.environments import Environment, obtain_environment
from benchmarks.ideal import ideal_seconds
from benchmarks.jobs import config_of
from benchmarks.limits import Limits, Shape
from benchmarks.materials import PROMPT_TOKENS, Materials, write_reward_model
from benchmarks.rounds import duel
from benchmarks.rows import Played, Row, alone, missing, row_of
from benchmarks.sizes import LEARNING_RATE, NUM_GENERATIONS
from benchmarks.works import Peer, Work
from meshift.cache_folder import cache_root
from meshift.data.packages import SMOLLM2

TRAIN_ROWS = 4096
"""Tokens of a micro-batch: the rows at which the products of training are measured."""
DTYPE = "bfloat16"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run of the benchmark is given."""

    materials: Materials
    environments: Path
    num_threads: int
    num_rounds: int
    num_warm_ups: int = 1
    device: str = "cpu"


class Suite:
    """Measures the machine once, then plays works."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self.settings = settings
        self.say = say
        self.measured: Mapping[str, Any] = {}
        self.agreement: Mapping[str, Any] = {}
        self._environments: dict[str, Environment] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        text = (self.settings.materials.model / "config.json").read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        return config

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return Shape.of(self.config)

    def measure(self, batches: list[int]) -> None:
        """The machine's limits, and that our fast paths agree with their twins."""
        files = self.settings.materials
        rows = sorted({*batches, 512, TRAIN_ROWS})
        self.say("measuring the machine")
        with self._side("machine", [sys.executable, "-m", "benchmarks.roofline"]) as side:
            side.start(config=self.config, rows=rows, train_rows=TRAIN_ROWS)
            self.measured = side.about
        self.say("comparing fast paths with their plain twins")
        with self._side("agreement", [sys.executable, "-m", "benchmarks.agreement"]) as side:
            side.start(
                model=str(files.model),
                texts=str(files.folder / "sft.json"),
                prompts=str(files.folder / "prompts.json"),
            )
            self.agreement = side.about

    def limits(self) -> Limits:
        """The measured limits in the compute type of the works."""
        gemm = {int(rows): rate for rows, rate in self.measured["gemm"][DTYPE].items()}
        return Limits(
            gemm=gemm,
            train_gemm=self.measured["train_gemm"][DTYPE],
            bandwidth=self.measured["bandwidth"],
            num_bytes=2,
        )

    def play(self, work: Work) -> list[Row]:
        """One row for each peer, or one of ours alone where there is no peer."""
        if work.method in ("ppo",):
            write_reward_model(self.settings.materials)
        try:
            if not work.peers:
                return [self._alone(work)]
            return [self._best(work, peer) for peer in work.peers]
        except OSError as error:
            return [missing(work, "", f"could not be run ({error})")]

    def _best(self, work: Work, peer: Peer) -> Row:
        """The duel with the peer's fastest setting; the others stand in the row's details."""
        environment = self._environment(peer.environment)
        if environment.python is None:
            return missing(work, peer.name, environment.fault)
        rows = [self._duel(work, peer, variant, environment.python) for variant in peer.variants]
        timed = [row for row in rows if row.ratio is not None]
        if not timed:
            return rows[0]
        best = min(timed, key=lambda row: row.ratio or 0.0)
        others = [{"setting": r.note, "peer": r.peer, "ratio": r.ratio} for r in rows if r is not best]
        return Row(**{**best.__dict__, "details": {**best.details, "other_settings": others}})

    def _duel(self, work: Work, peer: Peer, variant: str, python: Path) -> Row:
        self.say(f"{work.name} against {peer.name}" + (f" ({variant})" if variant else ""))
        command = [str(python), "-m", peer.module, peer.server]
        try:
            with self._ours(work) as ours, self._side(f"{peer.name}", command) as other:
                other.start(**self._given(work, peer), **peer.variants[variant])
                options = {"same_tokens": not work.natural}
                both = {"ours": ours, "peer": other}
                rounds = duel(both, self.settings.num_rounds, self._warm_ups(work), options)
                played = {
                    name: Played(about=side.about, rounds=rounds[name], memory_gb=side.peak_memory_gb())
                    for name, side in (("ours", ours), ("peer", other))
                }
        except ContestantError as error:
            return missing(work, peer.name, str(error))
        return row_of(work, peer.name, variant, played["ours"], played["peer"], self._ideal(work, played["ours"]))

    def _alone(self, work: Work) -> Row:
        self.say(work.name)
        try:
            with self._ours(work) as ours:
                rounds = duel({"ours": ours}, self.settings.num_rounds, self._warm_ups(work), {})["ours"]
                played = Played(about=ours.about, rounds=rounds, memory_gb=ours.peak_memory_gb())
        except ContestantError as error:
            return missing(work, "", str(error))
        return alone(work, played, self._ideal(work, played))

    def _warm_ups(self, work: Work) -> int:
        """Rounds that are dropped; none of PPO's, which take minutes and make 16 updates of each model."""
        return 0 if work.method == "ppo" else self.settings.num_warm_ups

    def _ideal(self, work: Work, ours: Played) -> float:
        """Seconds that the limits allow for the round in the middle."""
        middle = sorted(ours.rounds, key=lambda r: r.seconds)[len(ours.rounds) // 2]
        prompts = self._prompt_lengths(work) if work.group == "generation" else []
        return ideal_seconds(work, self.shape, self.limits(), prompts, middle.extra)

    def _prompt_lengths(self, work: Work) -> list[int]:
        if not work.natural:
            return [PROMPT_TOKENS] * work.batch
        text = (self.settings.materials.folder / "prompts.json").read_text(encoding="utf-8")
        return [len(prompt) for prompt in json.loads(text)["natural"][: work.batch]]

    @contextmanager
    def _ours(self, work: Work) -> Iterator[Contestant]:
        """Our process, started."""
        server = work.group if work.group in ("generation", "inference") else "training"
        with self._side("ours", [sys.executable, "-m", "benchmarks.ours", server]) as side:
            yield side.start(**self._ours_given(work))

    def _ours_given(self, work: Work) -> dict[str, Any]:
        if work.group in ("generation", "inference"):
            return self._work_on(work)
        files = self.settings.materials
        config = config_of(work.method, files.folder, str(files.model), work.batch, work.max_new_tokens)
        return {"config": config, "method": work.method}

    def _given(self, work: Work, peer: Peer) -> dict[str, Any]:
        """What a peer is started with, besides its variant."""
        files = self.settings.materials
        if peer.name == "openvino":
            given = self._work_on(work)
            del given["model"]
            package = SMOLLM2.package
            folder = cache_root() / "packages" / f"{package.project}-{package.version}"
            return given | {"gguf_file": str(folder / Path(package.member).name)}
        if work.group in ("generation", "inference"):
            return self._work_on(work)
        return {
            "method": work.method,
            "model": str(files.model),
            "folder": str(files.folder),
            "batch": work.batch,
            "max_new_tokens": work.max_new_tokens,
            "learning_rate": LEARNING_RATE,
            "num_generations": NUM_GENERATIONS,
        }

    def _work_on(self, work: Work) -> dict[str, Any]:
        """What both sides of generation and of inference are started with."""
        files = self.settings.materials
        if work.group == "inference":
            return {"model": str(files.model), "texts": str(files.folder / "sft.json"), "batch": work.batch}
        return {
            "model": str(files.model),
            "prompts": str(files.folder / "prompts.json"),
            "batch": work.batch,
            "max_new_tokens": work.max_new_tokens,
            "natural": work.natural,
        }

    def _environment(self, name: str) -> Environment:
        if name not in self._environments:
            self.say(f"looking for the environment {name}; making it takes minutes")
            self._environments[name] = obtain_environment(name, self.settings.environments)
        return self._environments[name]

    @contextmanager
    def _side(self, name: str, command: list[str]) -> Iterator[Contestant]:
        log = self.settings.environments / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        side = Contestant(
            name, command, num_threads=self.settings.num_threads, device=self.settings.device, log=log
        )
        try:
            yield side
        finally:
            side.close()
