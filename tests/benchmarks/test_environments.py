"""Environments of the peers, with a pip that is only pretended."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.environments import REQUIREMENTS, environment_folder, obtain_environment, reason_of, without
from benchmarks.works import all_works


class Pip:
    def __init__(self, fails=""):
        self.fails, self.commands = fails, []

    def __call__(self, command):
        self.commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            (Path(command[3]) / "bin").mkdir(parents=True)
            (Path(command[3]) / "bin" / "python").touch()
        failed = bool(self.fails) and "install" in command
        return subprocess.CompletedProcess(command, int(failed), "", self.fails if failed else "")


def test_an_environment_is_made_once(tmp_path):
    pip = Pip()
    first = obtain_environment("openvino", tmp_path, run=pip)
    assert first.python is not None
    assert obtain_environment("openvino", tmp_path, run=pip) == first
    assert [c[1:3] for c in pip.commands] == [["-m", "venv"], ["-m", "pip"]]


def test_one_that_cannot_be_installed_is_a_sentence_and_leaves_nothing_behind(tmp_path):
    pip = Pip("WARNING: slow\nERROR: No matching distribution found for openvino==2026.4.1\n")
    found = obtain_environment("openvino", tmp_path, run=pip)
    assert found.python is None
    assert found.fault == (
        "openvino could not be installed (No matching distribution found for openvino==2026.4.1)"
    )
    assert not list(tmp_path.iterdir())


def test_one_that_was_left_half_made_is_made_anew(tmp_path):
    requirements = (REQUIREMENTS / "openvino.txt").read_text()
    left = environment_folder("openvino", requirements, tmp_path) / "bin"
    left.mkdir(parents=True)
    (left / "python").touch()
    pip = Pip()
    assert obtain_environment("openvino", tmp_path, run=pip).python is not None
    assert len(pip.commands) == 2


def test_other_versions_are_another_environment(tmp_path):
    assert environment_folder("x", "a==1", tmp_path) != environment_folder("x", "a==2", tmp_path)


def test_packages_that_break_another_are_taken_out_again(tmp_path):
    assert without("# without: a b\nc==1\n") == ["a", "b"]
    pip = Pip()
    obtain_environment("vllm", tmp_path, run=pip)
    assert pip.commands[-1][-3:] == ["torchvision", "torchaudio", "torchcodec"]


@pytest.mark.parametrize("name", sorted({peer.environment for work in all_works() for peer in work.peers}))
def test_every_requirement_of_a_peer_is_pinned_to_one_version(name):
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted
    assert all("==" in line for line in wanted)


def test_without_an_error_line_the_last_line_is_the_reason():
    assert reason_of("a\nb\n") == "b"
    assert reason_of("") == "no reason given"
