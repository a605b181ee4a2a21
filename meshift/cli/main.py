"""`meshift <command>`: finds the command, and turns what goes wrong into one sentence and an exit code.

It knows nothing of what commands do, and imports nothing heavy: help and typing errors answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from meshift import __version__
from meshift.cli.chat import CHAT
from meshift.cli.check import CHECK
from meshift.cli.command import DOCS, Command, Parser, UsageError, did_you_mean, parse_command, refuse_unknown
from meshift.cli.convert import CONVERT
from meshift.cli.env import ENV
from meshift.cli.eval import EVAL
from meshift.cli.generate import GENERATE
from meshift.cli.plan import PLAN
from meshift.cli.policy_commands import POLICY_COMMANDS
from meshift.cli.preference_commands import PREFERENCE_COMMANDS
from meshift.cli.profile import PROFILE
from meshift.cli.report import REPORT
from meshift.cli.termination import EXIT_CODE, Terminated
from meshift.cli.train import DPO, PPO, REWARD, SFT
from meshift.errors import MeshiftError

TRAINING = (SFT, REWARD, DPO, PPO, *POLICY_COMMANDS, *PREFERENCE_COMMANDS)
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {c.name: c for c in (*TRAINING, GENERATE, CHAT, EVAL, REPORT, CONVERT, CHECK, PLAN, PROFILE, ENV)}
)

EXAMPLE = """\
examples:
  meshift reward --config recipes/quickstart_reward.yaml --dry-run
  meshift ppo --config run.yaml actor.learning_rate=1e-6 max_steps=100
  meshift check recipes/quickstart_sft.yaml
  meshift plan --config run.yaml --devices 64 --hardware h100 --explain
  meshift chat --model runs/ppo/final --system "Be brief."
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 when done, 1 when the run failed, 2 for a wrong input, 130 after Ctrl-C, 143
    after a SIGTERM that a command hears.

    An error that Meshift did not foresee is a defect: it keeps its traceback and asks for a report.
    """
    try:
        exit_code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return exit_code
    except MeshiftError as error:
        return _fail(str(error), error.exit_code)
    except Terminated:
        return _fail("terminated by SIGTERM; nothing was written", EXIT_CODE)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", 130)
    except SystemExit as leave:  # argparse has printed a help text or the version
        return leave.code if isinstance(leave.code, int) else 0
    except BrokenPipeError:  # the reader has left, as in `meshift ppo --help-config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        error.add_note(f"This is a defect of Meshift {__version__}: please report it, with this traceback.")
        raise


def _run(arguments: list[str]) -> int:
    parser = _main_parser()
    # Everything before the command is ours, everything after it the command's.
    parsed, unknown = parser.parse_known_args(arguments[:1])
    refuse_unknown(parser, unknown)
    if parsed.command is None:
        parser.print_help()
        return 0
    if parsed.command not in COMMANDS:
        hint = did_you_mean(parsed.command, COMMANDS) or f"the commands are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command `{parsed.command}`; {hint}")
    command = COMMANDS[parsed.command]
    return command.run(parse_command(command, arguments[1:]))


def _main_parser() -> Parser:
    width = max(len(name) for name in COMMANDS)
    listed = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="meshift",
        usage="meshift <command> [options] [key.sub=value ...]",
        description=f"Train language models from human feedback.\n\ncommands:\n{listed}",
        epilog=f"{EXAMPLE}\n`meshift <command> --help` explains one command.\ndocumentation: {DOCS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"meshift {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def _fail(sentence: str, exit_code: int) -> int:
    print(f"meshift: {sentence}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
