"""The list of works, and which peers do each: the table as data. It knows nothing of how they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.materials import PROMPT_TOKENS

Group = Literal["generation", "inference", "training", "rl"]
GROUPS: tuple[Group, ...] = ("generation", "inference", "training", "rl")
PEERS = ("transformers", "trl", "vllm", "openvino")
NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A program that does the same work: `python -m <module> <server>` in an environment.

    `variants` are settings that a user could choose; each is timed and the best is quoted.
    """

    name: str
    environment: str
    module: str
    server: str
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    devices: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row per peer. `batch` counts sequences, or pairs. `unit`: tokens/s (more is better) or s/step (less)."""

    name: str
    group: Group
    method: str
    batch: int
    peers: tuple[Peer, ...]
    unit: Literal["tokens/s", "s/step"] = "tokens/s"
    max_new_tokens: int = NEW_TOKENS
    natural: bool = False

    @property
    def expected_seconds(self) -> float:
        """A guess at one round of both sides on two processors, for the progress bar alone."""
        num_tokens = self.batch * (PROMPT_TOKENS + self.max_new_tokens)
        rates = {"generation": 200.0 + 6 * self.batch, "inference": 1500.0, "training": 250.0, "rl": 60.0}
        return num_tokens / min(rates[self.group], 600.0 if self.group == "generation" else 1e9)


BOTH = ("cpu", "cuda")
TRANSFORMERS = Peer(
    name="transformers",
    environment="trl",
    module="benchmarks.peers.transformers_generate",
    server="generation",
    variants={"dynamic cache": {"cache": "dynamic"}, "static cache": {"cache": "static"}},
    devices=BOTH,
)
VLLM = Peer(name="vllm", environment="vllm", module="benchmarks.peers.vllm_generate", server="generation")
OPENVINO = Peer(
    name="openvino", environment="openvino", module="benchmarks.peers.openvino_generate", server="generation"
)
FORWARD = replace(TRANSFORMERS, server="inference", variants={"": {}})
# Pure bf16 comes first, since it was the faster wherever both were timed; a quick run times the first only.
PRECISIONS = {"bf16 weights": {"precision": "pure_bf16"}, "bf16 autocast": {"precision": "autocast"}}
TRL = Peer(
    name="trl",
    environment="trl",
    module="benchmarks.peers.trl_training",
    server="training",
    variants=PRECISIONS,
    devices=BOTH,
)
TRL_PPO = replace(TRL, environment="trl_ppo", module="benchmarks.peers.trl_ppo")


def all_works() -> list[Work]:
    """The full list."""
    samplers = (TRANSFORMERS, VLLM, OPENVINO)
    forced = [_forced(batch, samplers) for batch in (1, 8, 32, 64, 128)]
    return [
        *forced,
        Work(
            name="generation, batch 64, natural EOS, ragged prompts",
            group="generation",
            method="generation",
            batch=64,
            natural=True,
            peers=samplers,
        ),
        Work(name="log-prob inference", group="inference", method="inference", batch=32, peers=(FORWARD,)),
        *(_training(method, batch) for method, batch in (("sft", 32), ("reward", 16), ("dpo", 16))),
        _rl("grpo", TRL),
        _rl("ppo", TRL_PPO),
    ]


def quick_works() -> list[Work]:
    """What takes about five minutes on two quiet processors: smaller works, one setting of each peer."""
    by_name = {work.name: work for work in all_works()}
    kept = [
        replace(by_name["generation, batch 8, forced length"], max_new_tokens=32, peers=(TRANSFORMERS, OPENVINO)),
        replace(by_name["generation, batch 64, forced length"], max_new_tokens=32),
        by_name["log-prob inference"],
        replace(by_name["sft step"], batch=8),
        replace(by_name["grpo step"], batch=8, max_new_tokens=16),
        replace(by_name["ppo step"], batch=8, max_new_tokens=16),
    ]
    return [with_first_settings(work) for work in kept]


def with_first_settings(work: Work) -> Work:
    """The work with one setting of each peer."""
    return replace(work, peers=tuple(first_setting(peer) for peer in work.peers))


def first_setting(peer: Peer) -> Peer:
    """The peer with its first variant only."""
    name = next(iter(peer.variants))
    return replace(peer, variants={name: peer.variants[name]})


def chosen(works: Sequence[Work], groups: Sequence[str], peers: Sequence[str], device: str) -> list[Work]:
    """The works of some groups, each with those of its peers that were asked for and that run on the device."""
    picked = [work for work in works if work.group in groups]
    return [
        replace(work, peers=tuple(p for p in work.peers if p.name in peers and device in p.devices))
        for work in picked
    ]


def _forced(batch: int, peers: tuple[Peer, ...]) -> Work:
    name = f"generation, batch {batch}, forced length"
    return Work(name=name, group="generation", method="generation", batch=batch, peers=peers)


def _training(method: str, batch: int) -> Work:
    return Work(name=f"{method} step", group="training", method=method, batch=batch, peers=(TRL,))


def _rl(method: str, peer: Peer) -> Work:
    return Work(name=f"{method} step", group="rl", method=method, batch=32, unit="s/step", peers=(peer,))
