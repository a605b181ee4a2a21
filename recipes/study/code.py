"""The study's code part: pass@k of MBPP's problems before and after PPO with unit-test rewards.

Both are `meshift eval`, and between them a normal PPO run on other problems of the file. What is done is kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meshift.cli.main import main as meshift
from meshift.cli.progress import RichObserver
from meshift.config.loading import load_config
from meshift.config.runs import PPORunConfig
from meshift.errors import InputError
from meshift.evaluation.estimators import pass_at_k
from meshift.evaluation.tasks import find_task, load_questions
from meshift.runtime.models import compute_dtype
from meshift.runtime.ppo_run import run_ppo
from recipes.study.points import RUNS
from recipes.study.setting import CodeSetting

MBPP = "pypi:mbpp"
COLUMNS = ("test_list", "test_setup_code", "code")
FOLDER, RESULT = "code", "result.json"


def run_code(setting: CodeSetting, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`before` and `after`: for each problem, how many samples are right; and the run's own metrics."""
    where = folder / FOLDER
    where.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(setting.model_dump_json().encode()).hexdigest()[:16]
    path = where / RESULT
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept
    started = time.perf_counter()
    write_training_problems(setting, where / "train.jsonl")
    config = config_of(setting, where)
    say("code: MBPP before PPO")
    before = _evaluated(setting, str(config.actor.model_name_or_path), where / f"before-{key}")
    say("code: PPO with unit-test rewards")
    with RichObserver() as observer:
        run = run_ppo(config.model_copy(update={"resume": True}), observer)
    say("code: MBPP after PPO")
    after = _evaluated(setting, str(run.final_dir), where / f"after-{key}")
    seconds = time.perf_counter() - started
    result = {"key": key, "before": before, "after": after, "metrics": dict(run.metrics), "seconds": seconds}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def config_of(setting: CodeSetting, where: Path) -> PPORunConfig:
    """The PPO run, in a folder of its own for each setting."""
    key = hashlib.sha256(setting.model_dump_json().encode()).hexdigest()[:8]
    given = [f"output_dir={where / f'ppo-{key}'}", f"data.dataset_name={where / 'train.jsonl'}", "report_to=[]"]
    length = f"generation.max_completion_length={setting.completion_length}"
    return load_config(PPORunConfig, RUNS / "code.yaml", [*given, length, *setting.overrides])


def write_training_problems(setting: CodeSetting, path: Path) -> None:
    """Problems behind the held-out ones, with the prompts that the evaluation gives."""
    questions = load_questions(find_task("mbpp"), MBPP)[setting.num_heldout :][: setting.num_train]
    rows = [{"prompt": one.prompt, **{name: one.row.get(name) for name in COLUMNS}} for one in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _evaluated(setting: CodeSetting, model: str, output: Path) -> dict[str, list[int]]:
    asked = ["eval", "--task", "mbpp", "--data", MBPP, "--model", model, "--output", str(output)]
    asked += ["--limit", str(setting.num_heldout), "--num-samples", str(setting.num_samples)]
    asked += ["--temperature", str(setting.temperature), "--max-new-tokens", str(setting.completion_length)]
    dtype = str(compute_dtype("auto")).removeprefix("torch.")  # what training computes with here
    asked += ["--dtype", dtype, "--k", ",".join(str(k) for k in setting.ks)]
    if meshift(asked) != 0:
        raise InputError(f"the evaluation in {output} failed; what it said stands above")
    return counts_of((output / "scores.jsonl").read_text(encoding="utf-8").splitlines())


def counts_of(lines: list[str]) -> dict[str, list[int]]:
    """By problem: how many samples, how many right; from the lines of `scores.jsonl`."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for line in lines:
        row = json.loads(line)
        found[row["id"]][0] += 1
        found[row["id"]][1] += bool(row["right"])
    return dict(found)


def rates(counts: dict[str, list[int]], k: int) -> list[float]:
    """pass@k of each problem, in the file's order."""
    return [pass_at_k(num_samples, num_right, k) for num_samples, num_right in counts.values()]
