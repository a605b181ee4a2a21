"""The command line answers every mistake with one sentence and the right exit code, and at once."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from meshift import __version__
from meshift.cli import main as command_line
from meshift.cli.command import Command
from meshift.cli.main import COMMANDS, main
from meshift.errors import DataError, NonFiniteError

CONFIG = """\
output_dir: {folder}/run
data: {{dataset_name: prompts.jsonl}}
actor: {{model_name_or_path: some/model}}
reward: {{functions: [{{function: a.py:f}}]}}
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.format(folder=tmp_path))
    return str(file)


def sentence(capsys):
    """What stands on stderr: one line, and nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("meshift: ")
    assert err.count("\n") == 1
    return err.removeprefix("meshift: ").rstrip("\n")


def with_command(monkeypatch, run):
    fake = Command(name="fake", summary="", description="", example="", configure=lambda parser: None, run=run)
    monkeypatch.setattr(command_line, "COMMANDS", {"fake": fake})
    return main(["fake"])


def raising(error):
    def run(args):
        raise error

    return run


def test_help_names_every_command_and_no_arguments_print_it(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == text
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshift {__version__}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_commands_help_says_what_it_does_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert COMMANDS[name].description in text
    assert f"meshift {name} " in text.partition("example:")[2]
    assert "documentation:" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pppo"], "unknown command `pppo`; did you mean `ppo`?"),
        (["zzz"], "unknown command `zzz`; the commands are sft, reward, dpo, ppo, grpo, dr-grpo, dapo, "),
        (["--versoin"], "unknown option `--versoin`; did you mean `--version`?"),
        (["ppo", "--dryrun"], "unknown option `--dryrun`; did you mean `--dry-run`?"),
        (["ppo", "--confg=x"], "unknown option `--confg=x`; did you mean `--config`?"),
        (
            ["ppo", "--actor.learning_rate=1"],
            "unknown option `--actor.learning_rate=1`; configuration keys go without dashes: "
            "actor.learning_rate=value",
        ),
        (["ppo", "run.yaml"], "`run.yaml` is no key=value; did you mean `--config run.yaml`?"),
        (["ppo", "max_steps"], "cannot read the override 'max_steps'; write it as key.sub=value"),
        (
            ["ppo", "actor.lerning_rate=1"],
            "unknown key `actor.lerning_rate`; did you mean `actor.learning_rate`?",
        ),
        (["reward", "--config", "absent.yaml"], "there is no config file absent.yaml"),
        (["ppo"], "a config is needed"),
        (["ppo", "--config"], "argument --config: expected one argument"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    assert sentence(capsys).startswith(expected)


def test_a_typo_is_found_wherever_it_stands_among_the_options(config, capsys):
    for arguments in (
        ["ppo", "max_steps=3", "--config", config, "ppo.lamm=1", "--dry-run"],
        ["ppo", "--dry-run", "ppo.lamm=1", "--config", config, "max_steps=3"],
    ):
        assert main(arguments) == 2
        assert sentence(capsys) == "unknown key `ppo.lamm`; did you mean `ppo.lam`?"


def test_help_config_lists_every_key_whole(capsys):
    from meshift.config.loading import describe_keys
    from meshift.config.runs import PPORunConfig

    assert main(["ppo", "--help-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key, default, _ in describe_keys(PPORunConfig):
        (row,) = [line.split() for line in lines if line.split()[:1] == [key]]
        assert row[1] == default.split()[0]


def test_errors_that_meshift_foresees_have_no_traceback(monkeypatch, capsys):
    assert with_command(monkeypatch, raising(DataError("a.jsonl:3: no prompt"))) == 2
    assert sentence(capsys) == "a.jsonl:3: no prompt"
    assert with_command(monkeypatch, raising(NonFiniteError("the loss is nan"))) == 1
    assert sentence(capsys) == "the loss is nan"


def test_ctrl_c_has_no_traceback(monkeypatch, capsys):
    assert with_command(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert sentence(capsys) == "interrupted; nothing was written"


def test_a_defect_keeps_its_traceback_and_asks_for_a_report(monkeypatch):
    with pytest.raises(ZeroDivisionError) as caught:
        with_command(monkeypatch, raising(ZeroDivisionError("division by zero")))
    assert "please report it" in caught.value.__notes__[0]


def test_a_defect_ends_the_process_with_1_and_the_request_last():
    code = (
        "import sys; from meshift.cli import main as m; from meshift.cli.command import Command\n"
        "fake = Command(name='fake', summary='', description='', example='', configure=lambda p: None,"
        " run=lambda args: 1 / 0)\n"
        "m.COMMANDS = {'fake': fake}; sys.exit(m.main(['fake']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "please report it" in done.stderr.splitlines()[-1]


def test_a_reader_that_leaves_early_is_no_defect():
    pipe = f"{sys.executable} -m meshift.cli.main ppo --help-config | head -1"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ppo", "--help"], ["ppo", "--help-config"], ["ppo", "a.b=1"], ["generate"]]
)
def test_help_and_typos_do_not_wait_for_torch(arguments):
    code = (
        "import sys; from meshift.cli.main import main; main(sys.argv[1:])\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'tensorboard')))"
    )
    command = [sys.executable, "-c", code, *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # CPU time, which a busy machine stretches less than the time on the wall; 0.3 s on an idle one.
    assert after.ru_utime - before.ru_utime < 2.0


def test_an_output_folder_of_another_run_is_refused_before_torch_is_imported(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    code = (
        "import sys; from meshift.cli.main import main; code = main(sys.argv[1:])\n"
        "sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", code, "ppo", "--config", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "overwrite_output_dir=true" in done.stderr


def test_ctrl_c_in_a_real_process_exits_with_130():
    code = (
        "import signal, sys, time; from meshift.cli import main as m; from meshift.cli.command import Command\n"
        # A shell starts what runs in its background without this.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def run(args):\n    print('running', flush=True); time.sleep(60)\n"
        "m.COMMANDS = {'fake': Command(name='fake', summary='', description='', example='',"
        " configure=lambda p: None, run=run)}\n"
        "sys.exit(m.main(['fake']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == "meshift: interrupted; nothing was written\n"
