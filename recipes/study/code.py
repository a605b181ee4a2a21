"""The study's code part: pass@k of MBPP's problems before and after PPO with unit-test rewards.

Each is `meshift eval`; between them is a normal PPO run on other problems of the file, and before it, where the
setting has one, a run of fine-tuning on their solutions. What is done is kept.
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
from meshift.config.runs import PPORunConfig, SFTRunConfig
from meshift.errors import InputError
from meshift.evaluation.estimators import pass_at_k
from meshift.evaluation.tasks import find_task, load_questions
from meshift.runtime.models import compute_dtype
from meshift.runtime.ppo_run import run_ppo
from meshift.runtime.run_folder import FINAL
from meshift.runtime.sft_run import run_sft
from recipes.study.points import RUNS
from recipes.study.setting import CodeSetting

MBPP = "pypi:mbpp"
COLUMNS = ("test_list", "test_setup_code", "code")
FOLDER, RESULT = "code", "result.json"
PROBLEMS, SOLUTIONS = "train.jsonl", "solutions.jsonl"
BEFORE, TUNED, AFTER = "before", "fine-tuned", "after PPO"


def run_code(setting: CodeSetting, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`stages`: of each, in order, how many samples of every problem are right; and the PPO run's own metrics."""
    where = folder / FOLDER
    where.mkdir(parents=True, exist_ok=True)
    key = key_of(setting)
    path = where / RESULT
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept
    started = time.perf_counter()
    write_training_problems(setting, where)
    policy, tuning = ppo_of(setting, where), tuning_of(setting, where)
    stages: dict[str, dict[str, list[int]]] = {}
    say("code: MBPP before training")
    stages[BEFORE] = _evaluated(setting, setting.model, where / f"before-{key}")
    if tuning is not None:
        say("code: fine-tuning on solutions")
        with RichObserver() as observer:
            tuned = run_sft(tuning.model_copy(update={"resume": True}), observer)
        stages[TUNED] = _evaluated(setting, str(tuned.final_dir), where / f"tuned-{key}")
    say("code: PPO with unit-test rewards")
    with RichObserver() as observer:
        run = run_ppo(policy.model_copy(update={"resume": True}), observer)
    say("code: MBPP after PPO")
    stages[AFTER] = _evaluated(setting, str(run.final_dir), where / f"after-{key}")
    seconds = time.perf_counter() - started
    result = {"key": key, "stages": stages, "metrics": dict(run.metrics), "seconds": seconds}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def key_of(setting: CodeSetting) -> str:
    """Of all that the part rests on."""
    return hashlib.sha256(setting.model_dump_json().encode()).hexdigest()[:16]


def tuning_of(setting: CodeSetting, where: Path) -> SFTRunConfig | None:
    """The fine-tuning that PPO starts from, in a folder of its own for each setting."""
    if setting.sft is None:
        return None
    given = [f"output_dir={_tuned(setting, where)}", f"data.dataset_name={where / SOLUTIONS}", "report_to=[]"]
    given += [f"model.model_name_or_path={setting.model}"]
    return load_config(SFTRunConfig, RUNS / "code_sft.yaml", [*given, *setting.sft])


def ppo_of(setting: CodeSetting, where: Path) -> PPORunConfig:
    """The PPO run, in a folder of its own for each setting."""
    given = [f"output_dir={where / f'ppo-{key_of(setting)}'}", f"data.dataset_name={where / PROBLEMS}"]
    given += ["report_to=[]", f"generation.max_completion_length={setting.completion_length}"]
    start = setting.model if setting.sft is None else _tuned(setting, where) / FINAL
    given += [f"actor.model_name_or_path={start}"]
    return load_config(PPORunConfig, RUNS / "code.yaml", [*given, *setting.overrides])


def _tuned(setting: CodeSetting, where: Path) -> Path:
    return where / f"sft-{key_of(setting)}"


def write_training_problems(setting: CodeSetting, where: Path) -> None:
    """Problems behind the held-out ones, with the prompts that the evaluation gives; and their solutions."""
    questions = load_questions(find_task("mbpp"), MBPP)[setting.num_heldout :][: setting.num_train]
    problems = [{"prompt": one.prompt, **{name: one.row.get(name) for name in COLUMNS}} for one in questions]
    solutions = [{"prompt": one.prompt, "completion": _unix(one.row.get("code"))} for one in questions]
    for name, rows in ((PROBLEMS, problems), (SOLUTIONS, solutions)):
        (where / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _unix(code: object) -> str:
    """Lines as every other file here ends them; half of MBPP's end with \\r\\n."""
    return str(code).replace("\r\n", "\n").rstrip()


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
