"""Each layer is found missing when it is, and the run is told what to do."""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import pytest

from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import ConfigError
from meshift.rewards.code.unit_tests import UnitTests
from meshift.rewards.sandbox import probes, slot
from meshift.rewards.sandbox.cgroup import make_group
from meshift.rewards.sandbox.launching import Launch, best_wall, package
from meshift.rewards.sandbox.layers import FIXES, LANDLOCK, LAYERS, LIMITS, NAMESPACES, WALL, Limits
from meshift.rewards.sandbox.slot import MemoryFile, Process, SandboxError, Slot

INNER = [layer for layer in LAYERS if layer != WALL]
WALLS = [best_wall()] if best_wall() == "own" else ["bubblewrap", "own"]


@pytest.fixture
def make_slot():
    made = []

    def make(wall=None, memory_bytes=probes.PROBE_BYTES):
        made.append(Slot(Launch(wall=wall or best_wall()), memory_bytes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def output_of(slot, code, layers=LAYERS, limits=probes.PROBE_LIMITS, stdin=b""):
    with (
        MemoryFile(code.encode()) as program,
        MemoryFile(stdin) as given,
        MemoryFile() as out,
        MemoryFile() as err,
    ):
        files = {"code": program.place, "stdin": given.place, "stdout": out.place, "stderr": err.place}
        [ended] = slot.run([Process(kind="program", files=files, limits=limits, layers=layers)])
        return out.read(2**16).decode(), err.read(2**12).decode(), ended


@pytest.mark.parametrize("wall", WALLS)
def test_every_layer_holds_behind_either_wall(wall):
    found = probes.probe([wall])
    assert found.missing == {}
    assert (found.wall, found.layers) == (wall, LAYERS)
    found.require_all()


@pytest.mark.parametrize("layer", INNER)
def test_the_attacks_on_a_layer_succeed_where_it_is_down(make_slot, layer):
    attacks, up = probes.ATTACKS[layer]
    server = make_slot()
    assert probes._wrong(server, attacks, up) is None
    wrong = probes._wrong(server, attacks, [other for other in up if other != layer])
    assert wrong is not None
    assert wrong.startswith("a program could ")


def test_the_attacks_on_the_wall_succeed_where_there_is_none(make_slot):
    wrong = probes._wrong_with_wall(make_slot("none"))
    assert wrong == "a program could read a file of the machine"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_missing_layer_stops_the_run_with_its_name_and_the_fix(monkeypatch, layer):
    found = probes.Protection(
        wall="own", layers=tuple(name for name in LAYERS if name != layer), missing={layer: "it was taken away"}
    )
    monkeypatch.setattr("meshift.rewards.code.unit_tests.probe", lambda: found)
    with pytest.raises(ConfigError) as caught:
        UnitTests(UnitTestsConfig())
    sentence = str(caught.value)
    assert sentence.startswith(f"the sandbox has no {layer} layer here (it was taken away)")
    assert FIXES[layer] in sentence
    assert "sandbox: unsafe" in sentence
    function = UnitTests(UnitTestsConfig(sandbox="unsafe", num_workers=1))
    logged = {}
    rewards = function(["p"], ["def f(x): return x"], logged.__setitem__, tests=[["assert f(1) == 1"]])
    assert rewards == [1.0], "without that layer, when the user says so"
    function._sandbox.close()


@pytest.mark.parametrize("wall", WALLS)
def test_a_virtual_environment_below_tmp_hides_nothing_and_shows_nothing(wall):
    """It has nothing of Python but packages: programs need none of it, and see none."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, with_pip=False, symlinks=True)
        search = [str(package().parent), *filter(None, sys.path)]
        found = subprocess.run(
            [f"{folder}/bin/python", "-c", OF_A_VENV, wall],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(search)},
            capture_output=True,
            text=True,
            check=True,
        )
    assert json.loads(found.stdout) == {"prefix": folder, "missing": {}, "venv": []}


OF_A_VENV = """
import json, sys
from meshift.rewards.sandbox.launching import Launch
from meshift.rewards.sandbox.probes import probe
found = probe([sys.argv[1]])
shown = [source for source, _ in Launch(wall=found.wall)._binds() if source.startswith(sys.prefix)]
print(json.dumps({"prefix": sys.prefix, "missing": dict(found.missing), "venv": shown}))
"""


def test_a_python_under_tmp_would_be_refused_though_the_user_says_unsafe(monkeypatch, caplog):
    """A program's own /tmp hides it: namespaces are left out, and the other layers stay."""
    monkeypatch.setattr(probes, "python_folders", lambda: ["/usr/lib/python3", "/tmp/python/lib"])
    with pytest.raises(ConfigError) as caught:
        UnitTests(UnitTestsConfig())
    sentence = str(caught.value)
    assert sentence.startswith("the sandbox has no namespaces layer here (Python is installed in /tmp/python/lib")
    assert "run Meshift by a Python that is installed elsewhere, or set sandbox: unsafe" in sentence
    function = UnitTests(UnitTestsConfig(sandbox="unsafe", num_workers=1))
    assert "generated programs run with less protection" in caplog.text
    assert set(function.protection.layers) == set(LAYERS) - {NAMESPACES}
    assert function.describe().endswith("; no namespaces"), "privileges are dropped all the same"
    tests = [["assert f(1) == 1"]]
    rewards = [function(["p"], [f"def f(x): return {x}"], lambda *_: None, tests=tests) for x in ("x", "x + 1")]
    assert rewards == [[1.0], [0.0]]
    function._sandbox.close()


def test_a_wall_that_does_not_come_up_is_named(monkeypatch):
    monkeypatch.setattr("meshift.rewards.sandbox.launching.Launch._bubblewrap", lambda self: ["/bin/false"])
    found = probes.probe(["bubblewrap"])
    assert WALL in found.missing
    assert found.wall == "none"


def test_a_file_that_one_program_left_is_not_there_for_the_next(make_slot):
    server = make_slot()
    assert output_of(server, "open('/tmp/x', 'w').write('1'); print('left')")[0] == "left\n"
    assert output_of(server, "import os; print(os.listdir('/tmp'))")[0] == "[]\n"


def memory_of_group(leader):
    """The bytes of all that the processes of a group may write to."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) != leader:
                continue
            with open(folder / "mem", "rb", buffering=0) as memory:
                for line in (folder / "maps").read_text().splitlines():
                    first, last = (int(part, 16) for part in line.split()[0].split("-"))
                    if " rw" in line:
                        memory.seek(first)
                        found.append(memory.read(last - first))
        except PermissionError:
            pytest.skip("only root may read the memory of another user's processes")
        except OSError:
            continue
    return b"".join(found)


def test_the_server_has_nothing_of_a_program_in_the_memory_that_the_next_one_begins_with(make_slot):
    server = make_slot()
    secret = str(random.SystemRandom().randrange(10**20))
    printed = output_of(server, f"print(input() + '{secret}'[::-1])", stdin=secret.encode())[0]
    assert printed == secret + secret[::-1] + "\n"
    memory = memory_of_group(server._finalizer.peek()[2][0].pid)
    assert b"wall_s" in memory, "the server's memory, which holds the names of its limits"
    assert secret.encode() not in memory
    assert secret[::-1].encode() not in memory


def test_limits_are_on_top_of_the_interpreter_and_hold(make_slot):
    server = make_slot()
    limits = Limits(cpu_s=2, wall_s=10, memory_bytes=64 * 2**20, output_bytes=1000)
    assert output_of(server, "x = bytearray(48 << 20); print(len(x))", limits=limits)[0] == f"{48 << 20}\n"
    assert "MemoryError" in output_of(server, "x = bytearray(70 << 20)", limits=limits)[1]
    assert len(output_of(server, "print('x' * 5000)", limits=limits)[0]) == 1000
    assert output_of(server, "print('x' * 900)", limits=limits)[0] == "x" * 900 + "\n"


def test_a_time_limit_counts_the_processor_and_a_sleeper_has_the_clock(make_slot):
    server = make_slot()
    limits = Limits(cpu_s=0.2, wall_s=1.0)
    [busy, asleep] = [
        output_of(server, code, limits=limits)[2] for code in ("while True: pass", "import time; time.sleep(9)")
    ]
    assert (busy.stopped, asleep.stopped) == ("cpu", "wall")
    assert 0.2 <= busy.cpu_s < 1.0
    assert asleep.cpu_s < 0.2


def test_a_cgroup_ends_what_the_limits_would_let_through(make_slot):
    group = make_group(2**26)
    if group is None:
        pytest.skip("this machine lets no cgroup be made")
    group.remove()
    server = make_slot(memory_bytes=0)
    without = [layer for layer in LAYERS if layer != LIMITS]
    output, _, ended = output_of(server, "x = bytearray(b'1') * (1 << 30); print('got it')", layers=without)
    assert server.has_cgroup
    assert output == ""
    assert os.WIFSIGNALED(ended.status)
    assert output_of(server, "print('goes on')")[0] == "goes on\n", "the server was not the one that ended"


def test_a_server_that_is_killed_is_started_anew(make_slot):
    server = make_slot()
    assert output_of(server, "print(1)")[0] == "1\n"
    process = server._finalizer.peek()[2][0]
    process.kill()
    os.killpg(process.pid, 9)
    assert output_of(server, "print(2)")[0] == "2\n"


def test_a_process_group_is_a_programs_own_whatever_the_kernels_landlock_knows_of_signals(make_slot):
    server = make_slot()
    server.start()
    process = server._finalizer.peek()[2][0]
    for layers in ((NAMESPACES,), [layer for layer in LAYERS if layer != LANDLOCK], LAYERS):
        output, _, ended = output_of(server, "import os\nos.kill(0, 9)\nprint('only itself')", layers)
        assert output in ("only itself\n", "")
        assert ended.stopped is None
    assert server._finalizer.peek()[2][0] is process
    assert process.poll() is None


def test_a_program_that_takes_the_server_with_it_fails_and_the_next_one_runs(make_slot):
    server = make_slot("none")  # behind our own wall it is the first process, which the kernel lets no child kill
    _, _, ended = output_of(server, "import os\nos.kill(os.getppid(), 9)\nos.read(0, 1)", layers=())
    assert ended.stopped == "server"
    assert output_of(server, "print(1)")[0] == "1\n"


def test_a_layer_that_cannot_be_put_up_is_an_error_and_no_verdict(make_slot, monkeypatch):
    server = make_slot()
    with pytest.raises(SandboxError, match="could not run a program"):
        output_of(server, "print(1)", limits=Limits(num_threads=-5))
    assert output_of(server, "print(2)")[0] == "2\n"


def test_nothing_is_left_when_a_slot_closes(make_slot):
    server = make_slot()
    output_of(server, "print(1)")
    process, _, group = server._finalizer.peek()[2]
    server.close()
    assert process.poll() is not None
    assert not slot.os.path.exists(f"/proc/{process.pid}")
    assert group is None or not group.path.exists()


def test_no_process_outlives_a_run_that_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom meshift.rewards.sandbox.launching import Launch, best_wall\n"
        "from meshift.rewards.sandbox.layers import Limits\n"
        "from meshift.rewards.sandbox.slot import MemoryFile, Process, Slot\n"
        "slot = Slot(Launch(wall=best_wall()), 2**28)\nslot.start()\n"
        "print(slot._finalizer.peek()[2][0].pid, flush=True)\n"
        "with MemoryFile(b'while True: pass') as code:\n"
        "    slot.run([Process(kind='program', files={'code': code.place}, limits=Limits(cpu_s=99, wall_s=99))])\n"
    )
    run = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    leader = int(run.stdout.readline())
    deadline = time.monotonic() + 10
    while len(group_members(leader)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(group_members(leader)) >= 2
    run.kill()
    run.communicate()
    while group_members(leader) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not group_members(leader)


def group_members(leader):
    """The processes of a group, by what they are called."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                found.append((folder / "cmdline").read_bytes())
    return found
