"""`meshift report` on the command line."""

import json
import subprocess
import sys

import pytest

from meshift.cli.main import main


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"training/global_step": 1, "loss": 2.0}) + "\n")
    return folder


def test_one_run_gets_its_report_beside_its_metrics(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_several_runs_are_compared_in_the_file_that_output_names(run, tmp_path):
    target = tmp_path / "both.html"
    assert main(["report", str(run), str(run), "--output", str(target)]) == 0
    assert "Comparison of 2 runs" in target.read_text()


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["--otput", "x"]])
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, capsys):
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_report_needs_no_torch(run):
    code = (
        "import sys; from meshift.cli.main import main; main(['report', sys.argv[1]]); "
        "sys.exit(f'{found} imported' if (found := {'torch', 'transformers', 'ray'} & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
