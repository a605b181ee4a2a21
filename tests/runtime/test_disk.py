"""A run that will not fit on its disk is told so before it begins, and at its end what is left."""

from types import SimpleNamespace

import pytest

from meshift.errors import SaveError
from meshift.runtime import disk, run_folder
from meshift.runtime.disk import bytes_to_write, space_note
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import build_ppo_job, run_ppo


def files_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_bound_is_one_and_not_far_above_what_a_run_writes(ppo_config_on_disk, tmp_path):
    config = ppo_config_on_disk(tmp_path / "run", max_steps=2, save_steps=1, report_to=[])
    bound = bytes_to_write(build_ppo_job(config).roles.values(), with_checkpoints=True)
    out = run_ppo(config, SilentObserver()).output_dir
    written = sum(files_of(out / name) for name in ("final", "final_critic")) + 2 * files_of(out / "checkpoint-1")
    small_files = 200_000  # tokenizers, configs, manifests
    assert written - small_files < bound < 1.2 * written
    without = bytes_to_write(build_ppo_job(config).roles.values(), with_checkpoints=False)
    assert without < bound / 3


@pytest.mark.parametrize(("free", "told"), [(2_000_000_000, False), (1_000_000_000, True)])
def test_a_run_that_does_not_fit_would_not_say_so(tmp_path, monkeypatch, free, told):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    note = space_note(tmp_path / "not" / "there", 1_500_000_000)
    assert (note is not None) == told
    if told:
        assert "1.00 GB free" in note
        assert "up to 1.50 GB" in note


def test_a_run_without_checkpoints_would_promise_to_go_on(ppo_config_on_disk, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "sync_tree", full)
    with pytest.raises(SaveError, match=r"final could not be written .*there is no earlier one; free space"):
        run_ppo(ppo_config_on_disk(tmp_path / "run", max_steps=1), SilentObserver())
