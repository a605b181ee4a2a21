"""Checkpoints on disk: whole or not there, found out when torn or changed, and safe from a full disk."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshift.errors import CheckpointError, OtherFormatError, SaveError
from meshift.runtime import checkpoints, durable
from meshift.runtime.checkpoints import (
    LATEST,
    MANIFEST,
    checkpoint_folders,
    find_checkpoint,
    latest_name,
    verify,
    write_checkpoint,
)
from meshift.runtime.durable import folder_aside, put_in_place, remove_leftovers, write_bytes


def fill(folder):
    (folder / "actor").mkdir()
    (folder / "actor" / "weights").write_bytes(bytes(range(200)))
    (folder / "values.json").write_text("{}")


def write(run, *steps, limit=None):
    for step in steps:
        write_checkpoint(run, step, fill, {"note": 0.1}, limit)


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_a_checkpoint_comes_back_with_its_step_and_facts(tmp_path):
    write(tmp_path, 3, 12)
    found = find_checkpoint(tmp_path)
    assert found.broken == []
    assert (found.checkpoint.step, found.checkpoint.facts) == (12, {"note": 0.1})
    assert (tmp_path / LATEST).read_text() == "checkpoint-12\n"
    assert names(tmp_path) == ["LATEST", "checkpoint-12", "checkpoint-3"]
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-12", "checkpoint-3"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def torn(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit": (lambda c: flip(c / "actor" / "weights"), r"weights is not as it was written"),
    "a torn file": (lambda c: torn(c / "actor" / "weights"), r"weights has 199 bytes instead of 200"),
    "a file that is gone": (lambda c: (c / "values.json").unlink(), r"values\.json is missing"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), r"manifest\.json is missing"),
    "a torn manifest": (lambda c: torn(c / MANIFEST) or torn(c / MANIFEST), r"manifest\.json cannot be read"),
    "an empty manifest": (lambda c: (c / MANIFEST).write_text(""), r"manifest\.json cannot be read"),
    "a manifest nested beyond reason": (
        lambda c: (c / MANIFEST).write_text("[" * 100_000),
        r"manifest\.json cannot be read",
    ),
    "another manifest": (lambda c: (c / MANIFEST).write_text("[1]"), r"manifest\.json cannot be read"),
    "an edited manifest": (
        lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text().replace('"step": 2', '"step": 1')),
        r"manifest\.json is not as it was written",
    ),
    "nothing but a folder": (lambda c: shutil.rmtree(c) or c.mkdir(), r"manifest\.json is missing"),
    "no folder": (shutil.rmtree, r"manifest\.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage):
    spoil, message = DAMAGES[damage]
    write(tmp_path, 1, 2)
    spoil(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "checkpoint-2")
    found = find_checkpoint(tmp_path)
    assert found.checkpoint.step == 1
    assert len(found.broken) == 1
    assert str(tmp_path / "checkpoint-2") in found.broken[0]


def test_a_renamed_checkpoint_does_not_pass_for_one_of_another_step(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / "checkpoint-9")
    assert "is of step 1, which is not what its folder is called" in find_checkpoint(tmp_path).broken[-1]


@pytest.mark.parametrize("content", [b"", b"checkpoint-", b"\xff\xfe", b"../elsewhere\n", None])
def test_without_a_readable_latest_the_newest_whole_checkpoint_is_used(tmp_path, content):
    write(tmp_path, 1, 2)
    (tmp_path / LATEST).unlink()
    if content is not None:
        (tmp_path / LATEST).write_bytes(content)
    assert latest_name(tmp_path) is None
    assert find_checkpoint(tmp_path).checkpoint.step == 2


def test_latest_decides_which_one_is_used(tmp_path):
    write(tmp_path, 1, 2, 3)
    (tmp_path / LATEST).write_text("checkpoint-2")
    assert find_checkpoint(tmp_path).checkpoint.step == 2


def test_only_as_many_as_wanted_are_kept_and_the_newest_always(tmp_path):
    write(tmp_path, *range(1, 5), limit=2)
    assert names(tmp_path) == ["LATEST", "checkpoint-3", "checkpoint-4"]
    write(tmp_path, 5, limit=1)
    assert names(tmp_path) == ["LATEST", "checkpoint-5"]


def test_checkpoints_of_a_future_that_was_left_do_not_push_out_the_new_ones(tmp_path):
    write(tmp_path, 1, 2, 7, 8)
    write(tmp_path, 3, limit=2)
    assert names(tmp_path) == ["LATEST", "checkpoint-2", "checkpoint-3"]


def test_a_torn_checkpoint_does_not_push_out_the_whole_one_before_it(tmp_path):
    write(tmp_path, 1, 2)
    torn(tmp_path / "checkpoint-2" / "values.json")
    write(tmp_path, 3, limit=2)
    assert names(tmp_path) == ["LATEST", "checkpoint-1", "checkpoint-3"]


def test_an_earlier_checkpoint_is_used_before_one_of_a_future_that_was_left(tmp_path):
    """Its metrics are there; those of the left future are not."""
    write(tmp_path, 1, 2, 8)
    (tmp_path / LATEST).write_text("checkpoint-2")
    torn(tmp_path / "checkpoint-2" / "values.json")
    assert find_checkpoint(tmp_path).checkpoint.step == 1
    torn(tmp_path / "checkpoint-1" / "values.json")
    assert find_checkpoint(tmp_path).checkpoint.step == 8


def test_a_whole_checkpoint_of_another_format_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    """Going on from the one before it would delete the work of the newer version."""
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + 1)
        write(tmp_path, 2)
    with pytest.raises(
        OtherFormatError, match=r"of format 2, and this version of meshift reads format 1; go on with"
    ):
        find_checkpoint(tmp_path)
    flip_format = (tmp_path / "checkpoint-1" / MANIFEST).read_text().replace('"format": 1', '"format": 3')
    (tmp_path / "checkpoint-1" / MANIFEST).write_text(flip_format)
    with pytest.raises(CheckpointError, match="not as it was written"):
        verify(tmp_path / "checkpoint-1")


def test_old_checkpoints_that_cannot_be_deleted_do_not_pass_for_a_failed_write(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "remove_folder", full)
    with pytest.raises(
        SaveError, match=r"checkpoint-2 is written, but older checkpoints in .* could not be deleted"
    ):
        write(tmp_path, 2, limit=1)
    assert latest_name(tmp_path) == "checkpoint-2"


def test_a_step_that_is_done_again_replaces_its_checkpoint(tmp_path):
    write(tmp_path, 1)
    torn(tmp_path / "checkpoint-1" / "values.json")
    write(tmp_path, 1)
    assert find_checkpoint(tmp_path).checkpoint.step == 1
    assert names(tmp_path) == ["LATEST", "checkpoint-1"]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["fill", "sync_tree", "manifest", "rename", "latest"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(tmp_path, monkeypatch, failing):
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        if failing == "sync_tree":
            patch.setattr("meshift.runtime.checkpoints.sync_tree", full)
        if failing == "manifest":
            patch.setattr("meshift.runtime.checkpoints._manifest", full)
        if failing == "rename":
            patch.setattr(os, "rename", full)
        if failing == "latest":
            patch.setattr(os, "replace", full)
        with pytest.raises(
            SaveError, match=r"checkpoint-2 .* \(No space left.*checkpoint-1 is as it was: free space"
        ):
            write_checkpoint(tmp_path, 2, full if failing == "fill" else fill, {}, 1)
    assert (tmp_path / LATEST).read_text() == "checkpoint-1\n"
    assert verify(tmp_path / "checkpoint-1").step == 1
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    assert find_checkpoint(tmp_path).checkpoint.step == 1


def test_a_disk_that_is_really_full_gives_a_sentence_and_loses_nothing(tmp_path):
    """A process that may write 64 KiB to a file, so that safetensors itself fails amid its file."""
    code = (
        "import sys, torch; from pathlib import Path; from meshift.errors import SaveError\n"
        "from meshift.runtime.checkpoints import write_checkpoint\n"
        "from meshift.training.checkpoint import State, write_state\n"
        "run, small, large = Path(sys.argv[1]), torch.ones(9), torch.ones(90_000)\n"
        "def fill(tensor): return lambda f: write_state(f / 'actor', State(tensors={'weight': tensor}))\n"
        "write_checkpoint(run, 1, fill(small), {})\n"
        "try: write_checkpoint(run, 2, fill(large), {})\n"
        "except SaveError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "checkpoint-2 could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == ["LATEST", "checkpoint-1"]
    assert find_checkpoint(tmp_path).checkpoint.step == 1


def test_what_a_dead_process_left_unfinished_goes_and_nothing_else(tmp_path):
    for name in (".checkpoint-3.tmp-17", ".final.tmp-17", ".final_critic.old-2", ".tensorboard.old-5", ".mine"):
        (tmp_path / name / "below").mkdir(parents=True)
    for name in (".LATEST.tmp-4", ".config.yaml.tmp-4", ".metrics.jsonl.tmp-4", "checkpoint-3.txt"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".mine", "checkpoint-3.txt"]


def test_an_exception_amid_writing_leaves_no_folder_behind(tmp_path):
    def interrupted():
        with folder_aside(tmp_path / "final") as aside:
            (aside / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_replacing_a_folder_leaves_only_the_new_files(tmp_path):
    for name, file in (("new", "b"), ("final", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(name)
    put_in_place(tmp_path / "new", tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["b"]


def test_every_file_and_folder_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave a checkpoint of the right name with empty files."""
    events = []
    sync, rename = durable.sync, os.rename
    monkeypatch.setattr(durable, "sync", lambda path: (events.append(("sync", Path(path).name)), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", Path(b).name)), rename(a, b)))
    write(tmp_path, 1)
    renamed = events.index(("rename", "checkpoint-1"))
    synced = {name for what, name in events[:renamed] if what == "sync"}
    assert {"weights", "values.json", MANIFEST, "actor"} <= synced
    assert any(name.startswith(".checkpoint-1.tmp-") for name in synced)
    assert ("sync", tmp_path.name) in events[renamed:], "the new name itself"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_bytes(tmp_path / LATEST, b"old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_bytes(tmp_path / LATEST, b"new")
    assert (tmp_path / LATEST).read_bytes() == b"old"
    assert names(tmp_path) == [LATEST]


def test_the_manifest_is_strict_json_with_every_file(tmp_path):
    write(tmp_path, 4)
    manifest = json.loads((tmp_path / "checkpoint-4" / MANIFEST).read_text())
    assert manifest["files"].keys() == {"actor/weights", "values.json"}
    assert manifest["files"]["actor/weights"]["bytes"] == 200
