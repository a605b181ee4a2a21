"""The command line of the benchmark: mistakes are answered at once, in one sentence, with exit code 2."""

import json

import pytest

from benchmarks import single_device
from benchmarks.single_device import choose, main, parser, write


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--against", "trl,vlm"], "--against: there is no 'vlm'; give some of transformers, trl, vllm, openvino"),
        (["--only", "everything"], "--only: there is no 'everything'"),
        (["--rounds", "2"], "--rounds is 2, and medians need at least 3"),
        (["--threads", "0"], "--threads is 0"),
        (["--works", "chess"], "--works: no work's name contains 'chess'"),
        (["--json", "no/such/folder/out.json"], "--json: there is no folder"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_measured(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert sentence in said(capsys)


def test_cuda_without_a_gpu_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(single_device.machine, "accelerator", lambda: None)
    assert main(["--device", "cuda"]) == 2
    assert "nvidia-smi finds no GPU" in said(capsys)


def test_against_nobody_times_us_alone():
    works = choose(parser().parse_args(["--against", ""]))
    assert works
    assert all(not work.peers for work in works)


def test_a_part_of_a_name_would_not_pick_its_works():
    (work,) = choose(parser().parse_args(["--works", "natural"]))
    assert work.natural


def test_the_first_setting_alone_would_not_be_timed():
    for settings, most in (("first", 1), ("all", 2)):
        works = choose(parser().parse_args(["--settings", settings]))
        assert max(len(peer.variants) for work in works for peer in work.peers) == most


def test_the_file_is_replaced_whole(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("an older result")
    write(path, {"rows": []})
    assert json.loads(path.read_text()) == {"rows": []}
    assert list(tmp_path.iterdir()) == [path]
