"""The study's theory: the counter-example, and the 8 x 8 scenario over numbers of pairs, betas and seeds.

Each of them is a file in the study's folder; one of today's setting is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from meshift.cli.counting import counts_shown
from meshift.config.loading import make_config
from meshift.counted import counted
from recipes.study.grid import GridSetting, run_seed
from recipes.study.setting import TheorySetting
from recipes.study.three_actions import three_actions

FOLDER, FORM = "theory", 2
"""`FORM` is of what a cell holds: a cell of another form is computed again."""


def run_theory(setting: TheorySetting, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`three_actions`, and `cells`: one per number of pairs and beta, with every seed's figures."""
    where = folder / FOLDER
    where.mkdir(parents=True, exist_ok=True)
    actions = _kept(where / "three_actions.json", "1", three_actions, say)
    cells = [
        _kept(
            where / f"pairs{grid.pairs_per_prompt}_beta{grid.beta:g}.json",
            _key(grid, setting.num_seeds),
            partial(_cell, grid, setting.num_seeds),
            say,
        )
        for grid in grids_of(setting)
    ]
    return {"three_actions": actions, "cells": cells}


def grids_of(setting: TheorySetting) -> list[GridSetting]:
    """Every number of pairs with every beta."""
    return [
        make_config(GridSetting, {**setting.training, "pairs_per_prompt": pairs, "beta": beta})
        for beta in setting.betas
        for pairs in setting.pairs_per_prompt
    ]


def runs_of(grid: GridSetting, num_seeds: int, *, num_processes: int) -> list[dict[str, Any]]:
    """Of every seed, in order. A network this small fills one core, so seeds share the cores as processes."""
    one = partial(run_seed, grid)
    seeds: Iterable[int] = range(num_seeds)
    if num_processes == 1:
        return list(counted(map(one, seeds), "seeds", lambda: num_seeds))
    context = get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(counted(pool.map(one, seeds), "seeds", lambda: num_seeds))


def _cell(grid: GridSetting, num_seeds: int) -> dict[str, Any]:
    runs = runs_of(grid, num_seeds, num_processes=min(num_seeds, torch.get_num_threads()))
    return {
        "setting": grid.model_dump(),
        "seeds": [run["figures"] for run in runs],
        "curves": [run["curves"] for run in runs],
        "first": {key: runs[0][key] for key in ("covered", "scores", "tables")},
    }


def _key(grid: GridSetting, num_seeds: int) -> str:
    return hashlib.sha256(json.dumps([FORM, grid.model_dump(), num_seeds], sort_keys=True).encode()).hexdigest()[
        :16
    ]


def _kept(
    path: Path, key: str, compute: Callable[[], dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return found
    say(f"theory: {path.stem}")
    started = time.perf_counter()
    with counts_shown():
        result = {"key": key, **compute(), "seconds": time.perf_counter() - started}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result
