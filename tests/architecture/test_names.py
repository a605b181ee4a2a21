"""Names: one word per concept, and no folder for things that were not thought through."""

import ast
import re

from source_trees import ROOT

FORBIDDEN_NAMES = {"utils", "util", "common", "base", "core", "impl", "manager", "helpers", "misc"}
FORBIDDEN_WORDS = {"utils", "common", "base", "core", "impl", "manager", "rpc", "mfc"}


def words_of(identifier: str) -> set[str]:
    """`BaseRolloutManager` and `base_rollout_manager` are both base, rollout, manager."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


def defined_names(tree: ast.Module):
    """(line, name) of all that the code itself names; what others named may be used as it is."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.arg():
                yield node.lineno, node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.lineno, node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.lineno, node.attr


def test_words_are_found_in_either_spelling():
    assert words_of("BaseRolloutManager") == words_of("base_rollout_manager") == {"base", "rollout", "manager"}
    assert words_of("RPCServer") == {"rpc", "server"}
    assert words_of("num_cores") == {"num", "cores"}


def test_no_file_or_folder_is_named_after_nothing_in_particular():
    paths = [p for folder in ("meshift", "recipes", "tests") for p in (ROOT / folder).rglob("*")]
    named = [p for p in paths if p.suffix == ".py" or p.is_dir()]
    found = [str(p.relative_to(ROOT)) for p in named if p.stem.removeprefix("test_") in FORBIDDEN_NAMES]
    assert not found


def test_identifiers_use_the_words_of_the_glossary(meshift_sources):
    found = [
        f"{s.name}:{line} {name}"
        for s in meshift_sources
        for line, name in defined_names(s.tree)
        if words_of(name) & FORBIDDEN_WORDS
    ]
    assert not found


def test_tests_stand_where_their_subject_stands():
    own = {"architecture", "benchmarks", "examples", "parity", "recipes"}
    folders = [p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("test_*.py"))]
    strays = [name for name in folders if name not in own and not (ROOT / "meshift" / name).is_dir()]
    assert not strays


def test_test_files_have_names_of_their_own():
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}, (
        "without packages pytest tells them apart by name"
    )
