"""How a run ends before its last step: SIGTERM, a full disk, another process in its folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_runs import Notes, changed, end_of

from meshift.cli.main import main
from meshift.config.loading import dump_config
from meshift.errors import ConfigError, SaveError, StoppedRunError
from meshift.runtime.observer import SilentObserver
from meshift.runtime.reward_run import run_reward
from meshift.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def test_two_processes_in_one_folder_are_kept_apart(tmp_path):
    with (
        RunFolder(tmp_path / "run", []) as folder,
        pytest.raises(ConfigError, match="another process is running in"),
        RunFolder(tmp_path / "run", []),
    ):
        pass
    with RunFolder(tmp_path / "run", []) as folder:
        folder.write_metrics(1, {})


def test_a_full_disk_ends_the_run_and_the_rest_can_be_done_later(reward_config, monkeypatch):
    config = reward_config()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            "meshift.runtime.checkpoints.sync_tree", lambda f: full() if ".checkpoint-4" in str(f) else None
        )
        with pytest.raises(SaveError, match=r"checkpoint-4 could not be written.*checkpoint-2 is as it was"):
            run_reward(config, SilentObserver())
    with monkeypatch.context() as patch:
        patch.setattr("meshift.runtime.run_folder.sync_tree", full)
        with pytest.raises(
            SaveError,
            match=r"final could not be written \(No space left.*checkpoint-4 is as it was: free space, and go on",
        ):
            run_reward(changed(config, resume=True), SilentObserver())
    assert not (Path(config.output_dir) / "final").exists()
    run_reward(changed(config, resume=True), SilentObserver())
    assert end_of(Path(config.output_dir)) == end_of(
        run_reward(reward_config("whole"), SilentObserver()).output_dir
    )


def test_a_metric_that_finds_the_disk_full_is_a_sentence(tmp_path, monkeypatch):
    with RunFolder(tmp_path / "run", []) as folder:
        folder._metrics.close()
        folder._metrics = Path("/dev/full").open("w")  # noqa: SIM115
        with pytest.raises(SaveError, match=r"/dev/full could not be written \(No space left on device\)"):
            folder.write_metrics(1, {})


def test_sigterm_finishes_the_step_and_keeps_it(reward_config):
    config = reward_config(save_steps=None)

    class Terminated(Notes):
        def on_step(self, step, metrics):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedRunError, match=r"after step 3; --resume goes on from .*checkpoint-3") as stopped:
        run_reward(config, Terminated())
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "as it was before"
    run_reward(changed(config, resume=True), SilentObserver())
    assert end_of(Path(config.output_dir)) == end_of(
        run_reward(reward_config("whole"), SilentObserver()).output_dir
    )


def test_a_second_sigterm_ends_the_run_at_once(reward_config):
    class Terminated(Notes):
        def on_call(self, step, name):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run_reward(reward_config(), Terminated())


def test_the_command_line_ends_on_sigterm_with_143_and_resumes_by_the_folders_name(
    reward_config, tmp_path, capsys
):
    config = reward_config(max_steps=100_000, save_steps=None)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    words = [sys.executable, "-m", "meshift.cli.main", "reward", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        metrics = Path(config.output_dir) / "metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.05)
        process.terminate()
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 143, last
    assert last.startswith("meshift: ended by SIGTERM after step ")
    done = len(metrics.read_text().splitlines())
    assert main(["reward", "--resume", config.output_dir, f"max_steps={done + 1}", "--dry-run"]) == 0
    assert f"going on after step {done}, from checkpoint-{done}" in " ".join(capsys.readouterr().out.split())
    assert main(["reward", "--resume", config.output_dir, f"max_steps={done + 1}"]) == 0
    assert len(metrics.read_text().splitlines()) == done + 1
    assert main(["reward", "--resume", config.output_dir]) == 0
    assert "is finished" in capsys.readouterr().err


@pytest.mark.parametrize(("warmup_steps", "told"), [(4, False), (5, True)])
def test_a_warmup_that_outlasts_the_run_would_go_unnoticed(reward_config, actor_folder, warmup_steps, told):
    model = {"model_name_or_path": str(actor_folder), "warmup_steps": warmup_steps}
    notes = Notes()
    run_reward(reward_config(model=model), notes)
    assert any("`model.warmup_steps` is 5, and the run has 5 steps" in text for text in notes.notes) == told
