"""The library is built once and kept, and where it cannot be there is one sentence that says why."""

import math
import os
import subprocess

import pytest
import torch

from meshift.kernels import build as subject
from meshift.kernels import cpu, library
from meshift.kernels.build import NEEDED_FLAGS, PAIRS_FLAG, SWITCH, build, cpu_flags
from meshift.kernels.cpu import Kernels

ANSWER = "long answer(void) { return ANSWER; }\n"


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A folder with one C file and a header in place of the kernels; a machine that could have them; no cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.c").write_text(f'#include "answer.h"\n{ANSWER}')
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(subject, "SOURCES", folder)
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(subject.platform, "system", lambda: "Linux")
    monkeypatch.setattr(subject.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(subject, "cpu_flags", lambda: NEEDED_FLAGS)
    return folder


@pytest.fixture
def compiler(sources, monkeypatch, tmp_path):
    """`compiler(script)`: what stands for gcc from then on."""

    def become(script: str) -> None:
        path = tmp_path / "fake-gcc"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(subject.shutil, "which", lambda name: str(path))

    return become


@pytest.fixture
def needs_compiler(cpu, sources):
    """Asks for the real kernels first: what this process has built is kept, and must not be `sources`."""


def kept(tmp_path):
    """What lies in the cache, folders of unfinished builds too."""
    return sorted(path.name for path in (tmp_path / "cache").glob("kernels/*"))


def fault_of(tmp_path):
    """The one sentence of a build that fails and leaves nothing."""
    built = build()
    assert built.library is None
    assert built.fault
    assert "\n" not in built.fault
    assert kept(tmp_path) == []
    return built.fault


@pytest.mark.parametrize("value", ["0", "off", "False", " no "])
def test_the_switch_would_not_leave_everything_to_torch(sources, monkeypatch, tmp_path, value):
    monkeypatch.setenv(SWITCH, value)
    monkeypatch.setattr(subject, "_obtain", lambda path: pytest.fail("it was built all the same"))
    assert SWITCH in fault_of(tmp_path)


def test_a_switch_that_is_on_would_switch_off(sources, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    assert subject.unsupported() == ""


def test_the_switch_would_not_reach_what_the_program_asks_for(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    built = cpu.built.__wrapped__()
    assert built.library is None
    assert SWITCH in built.fault


def test_a_missing_flag_would_be_met_by_an_illegal_instruction(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "cpu_flags", lambda: NEEDED_FLAGS - {"avx512dq", "fma"})
    assert "avx512dq, fma" in fault_of(tmp_path)


def test_a_processor_without_products_of_pairs_would_get_an_instruction_that_it_lacks(sources, monkeypatch):
    plain, name = subject.options(), subject._cached()
    monkeypatch.setattr(subject, "cpu_flags", lambda: NEEDED_FLAGS | {PAIRS_FLAG})
    assert set(subject.options()) - set(plain) == {"-mavx512bf16"}
    assert subject._cached() != name, "what was compiled for one is not taken for the other"


def test_products_and_roundings_without_the_instruction_are_those_of_torch(cpu, monkeypatch, tmp_path):
    """Where the processor has it, this is what other processors run; there, the other tests are too."""
    flags = cpu_flags() - {PAIRS_FLAG}
    monkeypatch.setattr(subject, "cpu_flags", lambda: flags)
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "build", build)
    mine = Kernels(library.built.__wrapped__().library)
    torch.manual_seed(0)
    for num_rows, inputs, columns in ((1, 2, 48), (9, 2, 50), (5, 64, 40), (70, 130, 97)):
        rows = torch.randn(num_rows, inputs).bfloat16()
        weight = torch.randn(columns, inputs).bfloat16()
        expected = rows.double() @ weight.double().T
        packed = mine.pack(weight)
        wide = mine.product(rows, packed, out=torch.empty(num_rows, columns))
        torch.testing.assert_close(wide.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine.product(rows, packed), wide.bfloat16()), "rounded to the nearest, ties to even"
    odd = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8], [-1.0, -(2.0**-8)], [3.3e38, 3.3e38], [1e-39, 0.0]])
    odd = torch.cat([odd, torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]])]).bfloat16()
    found = mine.product(odd, mine.pack(torch.ones(1, 2).bfloat16()))[:, 0].tolist()
    assert found[:5] == [1.0, 1.015625, -1.0, float("inf"), 0.0]
    assert math.isnan(found[5])
    assert found[6] == float("inf")


@pytest.mark.parametrize(("part", "value"), [("system", "Darwin"), ("machine", "aarch64")])
def test_another_machine_would_be_given_x86_code(sources, monkeypatch, tmp_path, part, value):
    monkeypatch.setattr(subject.platform, part, lambda: value)
    assert "x86-64" in fault_of(tmp_path)


def test_no_compiler_would_be_an_error(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(subject.shutil, "which", lambda name: None)
    assert "install gcc" in fault_of(tmp_path)


FAILING = {
    "says why": ("echo 'no such header' >&2; exit 3", "no such header"),
    "says nothing": ("exit 3", "ended with 3"),
    "cannot link": ('case " $* " in *" -shared "*) echo half > "$4"; echo no ld >&2; exit 1;; esac', "no ld"),
    "makes nothing": ("exit 0", "could not be built"),
    "makes no library": ('case " $* " in *" -shared "*) exit 0;; esac', "could not be built"),
}


@pytest.mark.parametrize("how", FAILING)
def test_a_compiler_that_fails_would_leave_half_a_library_or_stop_the_program(compiler, tmp_path, how):
    script, said = FAILING[how]
    compiler(script)
    assert said in fault_of(tmp_path)


def test_a_compiler_that_hangs_would_hang_the_program(compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "TIMEOUT_S", 0.1)
    compiler("exec sleep 2")
    assert "could not be built" in fault_of(tmp_path)


def test_a_compiler_that_is_gone_would_stop_the_program(sources, monkeypatch, tmp_path):
    monkeypatch.setattr(subject.shutil, "which", lambda name: str(tmp_path / "removed"))
    assert "removed" in fault_of(tmp_path)


def test_a_cache_that_cannot_be_written_would_stop_the_program(compiler, monkeypatch, tmp_path):
    compiler("exit 0")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path / "file"))
    assert "could not be built" in fault_of(tmp_path)


def test_a_torch_without_openmp_would_stop_the_program(needs_compiler, monkeypatch):
    monkeypatch.setattr(subject, "openmp_of_torch", lambda: None)
    built = build()
    assert built.library is None
    assert "OpenMP" in built.fault


def test_a_second_build_would_compile_again(needs_compiler, monkeypatch, tmp_path):
    assert build().library.answer() == 42
    (name,) = kept(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: pytest.fail("compiled again"))
    monkeypatch.setattr(subject.shutil, "which", lambda name: None)
    assert build().library.answer() == 42
    assert kept(tmp_path) == [name]


@pytest.mark.parametrize("changed", ["answer.c", "answer.h", "new.c", "options"])
def test_a_stale_library_would_be_used_after_a_change(needs_compiler, monkeypatch, tmp_path, sources, changed):
    assert build().library.answer() == 42
    if changed == "options":
        monkeypatch.setattr(subject, "OPTIONS", (*subject.OPTIONS, "-DUNUSED"))
    else:
        with (sources / changed).open("a") as file:
            file.write("#undef ANSWER\n#define ANSWER 43\n" if changed == "answer.h" else "/* new */\n")
    assert build().library.answer() == (43 if changed == "answer.h" else 42)
    assert len(kept(tmp_path)) == 2


def test_a_damaged_library_would_stop_the_program(needs_compiler, tmp_path):
    assert build().library.answer() == 42
    (path,) = (tmp_path / "cache" / "kernels").iterdir()
    path.unlink()  # never written to in place: it is mapped
    path.write_bytes(b"no library")
    assert build().library.answer() == 42


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_library_that_others_can_write_to_would_be_loaded(needs_compiler, tmp_path, mode):
    build()
    (path,) = (tmp_path / "cache" / "kernels").iterdir()
    path.unlink()  # never written to in place: it is mapped
    path.write_bytes(b"no library, and so no answer")
    path.chmod(mode)
    path.parent.chmod(mode)
    assert build().library.answer() == 42
    assert path.read_bytes() == b"no library, and so no answer"  # nothing is kept in such a folder


def test_a_library_that_is_a_link_would_be_loaded(needs_compiler, tmp_path):
    build()
    (path,) = (tmp_path / "cache" / "kernels").iterdir()
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    assert build().library.answer() == 42
    assert not path.is_symlink()


def test_a_cache_that_cannot_be_written_would_leave_the_program_without_kernels(
    needs_compiler, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path / "file"))
    assert build().library.answer() == 42


def test_openmp_of_torch_would_not_be_found(needs_compiler):
    found = subject.openmp_of_torch()
    assert found is not None
    assert found.is_file()
    assert os.access(found, os.R_OK)
