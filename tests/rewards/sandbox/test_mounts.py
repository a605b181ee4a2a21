"""Nothing is mounted in the machine's mount namespace, by the sandbox or by root's programs. Mounting is faked."""

import errno
import json
import struct
import subprocess
import sys

import pytest

from meshift.rewards.sandbox import mounts, wall


@pytest.fixture
def mounted(monkeypatch):
    calls = []
    monkeypatch.setattr(mounts, "mount", lambda *given: calls.append(given))
    monkeypatch.setattr(mounts, "unmount", lambda *given: calls.append(given))
    monkeypatch.setattr(mounts, "system_call", lambda *given: calls.append(given))
    return calls


def test_nothing_is_mounted_in_the_namespace_outside(mounted):
    with pytest.raises(OSError, match="still in the mount namespace outside") as caught:
        mounts.OwnMounts(mounts.mount_namespace())
    assert caught.value.errno == errno.EPERM
    assert mounted == []


def test_mounts_are_cut_off_from_those_outside_before_the_first(mounted):
    own = mounts.OwnMounts("mnt:[1]")
    own.mount("tmpfs", "/tmp", "tmpfs", 0)
    assert mounted == [
        ("none", "/", None, 0x4000 | 0x40000),  # MS_REC | MS_PRIVATE
        ("tmpfs", "/tmp", "tmpfs", 0, None),
    ]


def test_what_cannot_be_cut_off_gets_no_mounts(monkeypatch):
    def refuse(*given):
        raise PermissionError(given)

    monkeypatch.setattr(mounts, "mount", refuse)
    with pytest.raises(PermissionError):
        mounts.OwnMounts("mnt:[1]")


def test_a_wall_whose_namespaces_did_not_come_about_covers_nothing(mounted, monkeypatch):
    monkeypatch.setattr(wall, "unshare", lambda flags: None)
    monkeypatch.setattr(wall, "map_user", lambda *given: None)
    monkeypatch.setattr(wall, "_leave_in_child", lambda: None)
    with pytest.raises(OSError, match="still in the mount namespace outside"):
        wall.build([("/usr/lib", "/usr/lib")])
    assert mounted == []


def in_a_process(*lines):
    """What a process prints that enters the jail, with a `mount` that only writes down what it is asked for."""
    head = (
        "import json, os, sys",
        "from meshift.rewards.sandbox import jail, mounts",
        "from meshift.rewards.sandbox.layers import NAMESPACES, Limits",
        "calls, said = [], ''",
        "mounts.mount = lambda *given: calls.append(given)",
        "jail.map_user = lambda *given: None",
        "walls = jail.Walls.of_this_process([])",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((*head, *lines))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_child_that_is_in_its_servers_mount_namespace_covers_nothing():
    said, calls = in_a_process(
        "try:",
        "    jail.enter(walls, Limits(), (NAMESPACES,), os.geteuid())",
        "except OSError as error:",
        "    said = str(error)",
        "print(json.dumps([said, calls]))",
    )
    assert "still in the mount namespace outside" in said
    assert calls == []


def test_a_program_in_its_servers_mount_namespace_cannot_mount_though_root_runs_it():
    before, after, calls = in_a_process(
        "def able():",
        "    status = dict(line.split(':', 1) for line in open('/proc/self/status'))",
        "    return [int(status[name], 16) for name in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')]",
        "before = able()",
        "jail.enter(walls, Limits(), (), os.geteuid())",
        "print(json.dumps([before, able(), calls]))",
    )
    assert after == [sets & ~(1 << 21) for sets in before], "CAP_SYS_ADMIN alone is gone"
    assert calls == []


def test_one_capability_is_given_up_and_no_other(monkeypatch):
    """For whoever runs the tests without any."""
    set_to = []

    def system_call(name, header, sets):
        assert struct.unpack_from("=Ii", header.raw) == (0x20080522, 0)
        if name == "capget":
            sets[:24] = b"\xff" * 24
        else:
            set_to.append(struct.unpack("=6I", sets.raw))

    monkeypatch.setattr(mounts, "system_call", system_call)
    mounts.give_up_mounting()
    all_but_one = 0xFFFFFFFF ^ (1 << 21)
    assert set_to == [(all_but_one, all_but_one, all_but_one, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)]
