"""A run's folder: strict JSON, on disk at once, and no run written over another."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from meshift.config.loading import load_config, make_config
from meshift.config.runs import RewardRunConfig
from meshift.errors import ConfigError
from meshift.runtime.run_folder import CONFIG_HEADER, RunFolder, check_inputs_stay, check_output_dir


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def lines(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_are_one_strict_json_object_per_step(tmp_path):
    with RunFolder(tmp_path / "a" / "run", []) as folder:
        folder.write_metrics(1, {"loss": 0.5, "num": 3, "nan": math.nan, "inf": math.inf, "down": -math.inf})
        folder.write_metrics(2, {"loss": np.float32(0.25), "tensor": torch.tensor(1.5)})
    assert lines(tmp_path / "a" / "run" / "metrics.jsonl") == [
        {"training/global_step": 1, "loss": 0.5, "num": 3, "nan": None, "inf": None, "down": None},
        {"training/global_step": 2, "loss": 0.25, "tensor": 1.5},
    ]


def test_samples_keep_their_text_and_lose_only_what_json_cannot_say(tmp_path):
    with RunFolder(tmp_path / "run", []) as folder:
        folder.write_samples([{"prompt": "ä\n\u2028", "reward": math.nan, "parts": [1.0, math.inf], "ok": True}])
    text = (tmp_path / "run" / "samples.jsonl").read_text().strip("\n")
    expected = {"prompt": "ä\n\u2028", "reward": None, "parts": [1.0, None], "ok": True}
    assert json.loads(text, parse_constant=refuse) == expected


def test_a_line_is_on_disk_when_the_process_is_killed_right_after(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from meshift.runtime.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]), []).__enter__()\n"
        "folder.write_metrics(1, {'loss': 1.0}); folder.write_samples([{'prompt': 'x'}])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert lines(tmp_path / "run" / "metrics.jsonl") == [{"training/global_step": 1, "loss": 1.0}]
    assert lines(tmp_path / "run" / "samples.jsonl") == [{"prompt": "x"}]


def test_sync_waits_for_metrics_and_samples_and_for_all_that_was_written(tmp_path, monkeypatch):
    synced = []
    with RunFolder(tmp_path / "run", []) as folder:
        folder.write_metrics(1, {"loss": 0.5})
        folder.write_samples([{"prompt": "a"}])
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number)))
        folder.sync()
        monkeypatch.undo()
        files = [(tmp_path / "run" / name).stat() for name in ("metrics.jsonl", "samples.jsonl")]
    assert [(file.st_ino, file.st_size) for file in synced] == [(file.st_ino, file.st_size) for file in files]
    assert min(file.st_size for file in files) > 0


def test_another_runs_folder_is_refused_with_the_way_out(tmp_path):
    with RunFolder(tmp_path / "run", []) as folder:
        folder.write_metrics(1, {"loss": 1.0})
    with (
        pytest.raises(ConfigError, match=r"another run; .*overwrite_output_dir=true"),
        RunFolder(tmp_path / "run"),
    ):
        pass
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_overwriting_leaves_nothing_of_the_old_run_and_everything_else(tmp_path):
    path = tmp_path / "run"
    with RunFolder(path, []) as folder:
        folder.write_metrics(1, {"loss": 1.0})
        folder.write_samples([{"prompt": "old"}])
    (path / "config.yaml").write_text(f"{CONFIG_HEADER}\n")
    (path / "final").mkdir()
    (path / "final" / "model.safetensors").write_text("old")
    (path / "notes.txt").write_text("mine")
    with RunFolder(path, [], overwrite=True) as folder:
        folder.write_metrics(1, {"loss": 2.0})
    assert lines(path / "metrics.jsonl") == [{"training/global_step": 1, "loss": 2.0}]
    assert (path / "samples.jsonl").read_text() == ""
    assert not (path / "final").exists()
    assert (path / "notes.txt").read_text() == "mine"


def test_overwriting_a_folder_that_is_no_runs_deletes_nothing(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "config.yaml").write_text("mine")
    with RunFolder(tmp_path, [], overwrite=True):
        pass
    assert (tmp_path / "report.html").read_text() == "mine"
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_run_that_failed_before_its_first_step_can_be_started_again(tmp_path):
    with pytest.raises(RuntimeError, match="model"), RunFolder(tmp_path / "run", []):
        raise RuntimeError("no model")
    with RunFolder(tmp_path / "run", []) as folder:
        folder.write_metrics(1, {})
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run is a file"), RunFolder(tmp_path / "run"):
        pass
    with pytest.raises(ConfigError, match="cannot write to"), RunFolder(tmp_path / "run" / "below"):
        pass


def test_the_written_config_starts_the_same_run_again(tmp_path):
    values = {"output_dir": "x", "data": {"dataset_name": "d"}, "model": {"model_name_or_path": "m"}}
    config = make_config(RewardRunConfig, values)
    with RunFolder(tmp_path / "run", []) as folder:
        folder.write_config(config)
    assert load_config(RewardRunConfig, tmp_path / "run" / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["model_name_or_path"] == "m"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
    ]


def test_curves_are_what_was_logged_without_the_numbers_that_are_none(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunFolder(tmp_path / "run", ["tensorboard"]) as folder:
        for step in (1, 2):
            folder.write_metrics(step, {"loss": step / 2, "bad": math.nan})
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curves.Reload()
    assert [(e.step, e.value) for e in curves.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    assert "bad" not in curves.Tags()["scalars"]


def test_writing_outside_the_with_is_a_mistake_and_not_a_loss(tmp_path):
    folder = RunFolder(tmp_path / "run", [])
    with pytest.raises(RuntimeError, match="between entering and leaving"):
        folder.write_metrics(1, {})


def test_without_the_flag_nothing_that_is_worth_keeping_goes(tmp_path):
    """An empty metrics.jsonl is no licence: a start that failed leaves one beside what was there before."""
    path = tmp_path / "run"
    for name in ("final/model.safetensors", "final_critic/config.json", "samples.jsonl", "config.yaml"):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        (path / "metrics.jsonl").write_text("")
        with pytest.raises(ConfigError, match=r"holds .*overwrite_output_dir=true"), RunFolder(path, []):
            pass
        assert file.read_text() == "mine"
        file.unlink()
        if file.parent != path:
            file.parent.rmdir()


def test_the_users_own_config_is_not_replaced_without_the_flag(tmp_path):
    (tmp_path / "config.yaml").write_text("# my notes\noutput_dir: x\n")
    with pytest.raises(ConfigError, match=r"a config\.yaml that no run wrote"):
        check_output_dir(tmp_path, overwrite=False)
    check_output_dir(tmp_path, overwrite=True)


def test_a_run_that_was_broken_off_in_its_first_step_can_be_started_again(tmp_path):
    values = {"output_dir": "x", "data": {"dataset_name": "d"}, "model": {"model_name_or_path": "m"}}
    config = make_config(RewardRunConfig, values)
    for _ in range(2):
        with RunFolder(tmp_path / "run", ["tensorboard"]) as folder:
            folder.write_config(config)
    assert load_config(RewardRunConfig, tmp_path / "run" / "config.yaml") == config


@pytest.mark.parametrize("name", ["final", "final_critic"])
def test_a_model_that_no_run_wrote_is_not_removed_even_with_the_flag(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds {name}/ without the config\.yaml of a run that wrote it"):
        check_output_dir(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_where_a_model_goes_is_found_before_training(tmp_path, overwrite):
    (tmp_path / "final").write_text("")
    with pytest.raises(ConfigError, match="final is a file, where the run would put a model"):
        check_output_dir(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize(
    ("section", "key"),
    [("model", "model_name_or_path"), ("data", "dataset_name"), ("data", "eval_dataset_name")],
)
def test_an_input_that_the_run_would_delete_is_refused(tmp_path, section, key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"output_dir": "out", "data": {"dataset_name": "d"}, "model": {"model_name_or_path": "m"}}

    def config_with(path):
        return make_config(RewardRunConfig, values | {section: values[section] | {key: path}})

    for inside in ("out/final", "./out/../out/samples.jsonl", str(tmp_path / "out" / "final" / "x")):
        with pytest.raises(ConfigError, match=f"`{section}.{key}` .* lies in `output_dir` out"):
            check_inputs_stay(config_with(inside), Path("out"))
    for outside in ("out/mine", "out", "final", "org/final"):
        check_inputs_stay(config_with(outside), Path("out"))
    if section == "data":
        with pytest.raises(ConfigError, match="lies in `output_dir` out"):
            check_inputs_stay(config_with("out/samples.jsonl[:10]"), Path("out"))
