"""A run on a disk that is full again and again: a sentence each time, and in the end the unbroken run's bytes."""

import subprocess

import pytest
from broken_runs import end_of

from meshift.cli.main import main
from meshift.config.loading import dump_config
from meshift.errors import SaveError
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import run_ppo
from meshift.runtime.run_folder import RunFolder


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(num_kilobytes)` makes a disk of that size, or changes the size of the one there is."""
    disk = tmp_path / "disk"

    def resize(num_kilobytes):
        options = f"size={num_kilobytes}k" if not disk.exists() else f"remount,size={num_kilobytes}k"
        disk.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        if subprocess.run(words, capture_output=True, check=False).returncode != 0:
            pytest.skip("this user may not mount a file system")
        return disk

    yield resize
    subprocess.run(["umount", str(disk)], capture_output=True, check=False)


def test_a_disk_that_fills_up_anywhere_in_a_run_shows_no_traceback_and_costs_no_byte(
    small_disk, ppo_config_on_disk, tmp_path, capsys
):
    sections = {"max_steps": 3, "save_steps": 1, "ppo": {"num_mini_batches": 2, "adaptive_kl": True}}
    whole = end_of(run_ppo(ppo_config_on_disk(tmp_path / "whole", **sections), SilentObserver()).output_dir)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(ppo_config_on_disk(small_disk(4) / "run", **sections)), encoding="utf-8")
    full = []
    for num_kilobytes in (*range(4, 40, 4), *range(40, 2000, 20)):
        disk = small_disk(num_kilobytes)
        capsys.readouterr()
        code = main(["ppo", "--config", str(file), "--resume"])
        if code == 0:
            break
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert code == 1
        assert sentence.startswith("meshift: ")
        assert "could not be written (" in sentence
        assert "--resume" in sentence
        assert not [path for path in (disk / "run").iterdir() if path.name.startswith(".checkpoint")]
        full.append(sentence)
    assert end_of(disk / "run") == whole
    for what in ("run/metrics.jsonl", "run/checkpoint-1", "run/checkpoint-2", "run/final"):
        assert any(f"{what} could" in sentence for sentence in full), what


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_no_defect_wherever_it_shows(tmp_path, number):
    import errno

    def fail():
        raise OSError(getattr(errno, number), "full", str(tmp_path / "run" / "x"))

    with pytest.raises(SaveError, match=r"run/x could not be written \(full\)"), RunFolder(tmp_path / "run", []):
        fail()
    with pytest.raises(PermissionError), RunFolder(tmp_path / "run", []):
        raise PermissionError(errno.EACCES, "denied")
