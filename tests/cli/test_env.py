"""`meshift env` says what a bug report needs, and nothing of the user."""

import json
import sys
from importlib import metadata
from pathlib import Path

import torch
import transformers

from meshift import __version__
from meshift.cli import env
from meshift.cli.main import main
from meshift.kernels.cpu import who_multiplies


def test_the_json_holds_what_a_report_needs(capsys, monkeypatch, tmp_path):
    cache = str(tmp_path / "absent")
    monkeypatch.setenv("MESHIFT_CACHE", cache)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = found["run"]
    assert (run["meshift"], run["torch"]) == (__version__, torch.__version__)
    assert run["transformers"] == transformers.__version__
    assert (run["threads"], run["cuda_usable"]) == (torch.get_num_threads(), torch.cuda.is_available())
    assert run["cpu_kernels"] == who_multiplies()
    assert found["packages"]["rich"] == metadata.version("rich")
    assert "gguf" in found["packages"]
    assert found["cache"] == {"folder": cache, "gb": 0.0}
    assert found["variables"]["MESHIFT_CACHE"] == cache
    assert 0 < found["memory"]["free_gb"] <= found["memory"]["total_gb"]


def test_the_text_says_the_same_topics(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for topic in ("run", "packages", "system", "cpu", "memory", "gpus", "cache"):
        assert f"\n{topic}" in out
    assert f"transformers {transformers.__version__}" in out


def test_the_size_of_the_cache_is_that_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "derived").mkdir()
    (tmp_path / "derived" / "weights").write_bytes(bytes(20_000_000))
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path))
    assert env._cache()["gb"] == 0.02


def test_the_home_folder_is_not_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("MESHIFT_CACHE", raising=False)
    assert env._cache()["folder"] == "~/.cache/meshift"


def test_where_torch_is_broken_that_is_what_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["env", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert run["torch"].startswith("cannot be imported: ")
    assert run["meshift"] == __version__


def test_a_program_that_is_missing_or_fails_is_no_error():
    assert env._output(["no-such-program-anywhere"]) == ""
    assert env._output(["false"]) == ""
