"""Runs the points of the sentiment study that are not done yet, and keeps what each is worth.

A point's folder is a normal run's, with `judged.json` beside. A point whose file bears today's key is not run
again; one that was broken off goes on from its last checkpoint, or begins again.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meshift.cli.counting import counts_shown
from meshift.cli.progress import RichObserver
from meshift.runtime.run_folder import FINAL
from recipes.study.judging import PROMPTS, SEED, draw_pairs, judge
from recipes.study.points import METHODS, Point, config_of, key_of, points_of
from recipes.study.setting import SentimentSetting

JUDGED, KEYS = "judged.json", "keys"
PAIR_FILES = ("pairs.jsonl", "pairs-heldout.jsonl", "chosen.jsonl")
After = Callable[[Mapping[str, dict[str, Any]]], object]
"""Hears of all that is done, after every point."""


class SentimentStudy:
    """The points, in their order."""

    def __init__(self, setting: SentimentSetting, folder: Path, say: Callable[[str], None]) -> None:
        self.setting = setting
        self.folder = folder
        self.say = say
        self.points = points_of(setting)
        self.keys: dict[str, str] = {}

    def run(self, after: After) -> dict[str, dict[str, Any]]:
        """Everything that is left; returns the results of all points by name."""
        results: dict[str, dict[str, Any]] = {}
        for number, point in enumerate(self.points, 1):
            title = f"{number}/{len(self.points)}  {point.name}"
            results[point.name] = self._kept(point) or self._run(point, title)
            if point.method == "reference":
                self._write_pairs()
            after(results)
        return results

    def key(self, point: Point) -> str:
        """Of the point's config and all that it rests on."""
        if point.name not in self.keys:
            by_name = {other.name: other for other in self.points}
            parents = [self.key(by_name[name]) for name in point.parents]
            setting = self.setting
            judging: list[Any] = [SEED, setting.num_heldout_prompts, setting.completion_length]
            judging += [] if point.method == "reference" else [setting.pairs.model_dump()]
            config = config_of(point, setting, self.folder)
            self.keys[point.name] = key_of(config, parents, judging)
        return self.keys[point.name]

    def _kept(self, point: Point) -> dict[str, Any] | None:
        """What an earlier run of the study found, where that is of today's setting and nothing needed is gone."""
        path = self.folder / point.name / JUDGED
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        needed = point.name in self._parents() and not (self.folder / point.name / FINAL).is_dir()
        return None if found["key"] != self.key(point) or needed else found

    def _parents(self) -> set[str]:
        return {name for point in self.points for name in point.parents}

    def _run(self, point: Point, title: str) -> dict[str, Any]:
        self.say(title)
        started = time.perf_counter()
        metrics = self._train(point)
        trained = time.perf_counter() - started
        result = {
            "key": self.key(point),
            "metrics": dict(metrics),
            "train_seconds": trained,
            **self._judged(point),
        }
        result["seconds"] = time.perf_counter() - started
        _write(self.folder / point.name / JUDGED, result)
        if point.name not in self._parents() and not self.setting.keep_models:
            for models in (self.folder / point.name).glob(f"{FINAL}*"):
                shutil.rmtree(models)
        gc.collect()
        return result

    def _train(self, point: Point) -> Mapping[str, float]:
        """A run as any other; it goes on where it was broken off, if it is the same run."""
        run, key, begun = self.folder / point.name, self.key(point), self.folder / KEYS / point.name
        same = begun.is_file() and begun.read_text(encoding="utf-8") == key
        if not same and run.is_dir():
            shutil.rmtree(run)
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(key, encoding="utf-8")
        config = config_of(point, self.setting, self.folder).model_copy(update={"resume": True})
        with RichObserver() as observer:
            metrics: Mapping[str, float] = METHODS[point.method].run(config, observer).metrics
        return metrics

    def _judged(self, point: Point) -> dict[str, Any]:
        if not point.is_policy:
            return {}
        rewards = self.folder / f"reward_seed{point.seed}" / FINAL
        policy, reference = (self.folder / name / FINAL for name in (point.name, "reference"))
        num_prompts, length = self.setting.num_heldout_prompts, self.setting.completion_length
        with counts_shown():
            return judge(policy, reference, rewards if rewards.is_dir() else None, num_prompts, length).as_json()

    def _write_pairs(self) -> None:
        """The preferences that the reward model, SFT and DPO learn from, once for a reference."""
        marker = self.folder / KEYS / "pairs"
        reference, pairs = self.points[0], self.setting.pairs
        key = f"{self.key(reference)} {pairs.model_dump_json()}"
        if marker.is_file() and marker.read_text(encoding="utf-8") == key:
            return
        self.say(f"preference pairs: {pairs.num_completions} completions of each of {pairs.num_prompts} {PROMPTS}")
        final = self.folder / reference.name / FINAL
        with counts_shown():
            rows = draw_pairs(final, pairs.num_prompts, pairs.num_completions, self.setting.completion_length)
        kept = pairs.num_heldout
        train, heldout = rows[:-kept], rows[-kept:]
        chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in train]
        for name, part in zip(PAIR_FILES, (train, heldout, chosen), strict=True):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (self.folder / name).write_text(lines, encoding="utf-8")
        marker.parent.mkdir(exist_ok=True)
        marker.write_text(key, encoding="utf-8")


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(values) + "\n", encoding="utf-8")
    unfinished.replace(path)
