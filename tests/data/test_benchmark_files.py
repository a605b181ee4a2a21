"""Benchmarks out of packages: rows keep their columns, and no two members lie in one place of the cache."""

import gzip
import json

import pytest

from meshift.data import packages
from meshift.data.benchmark_files import write_mbpp, write_rows, write_unpacked
from meshift.data.packages import obtain
from meshift.data.rows import read_rows
from meshift.errors import DataError

ROWS = [{"task_id": "a/0", "prompt": "é\u2028"}, {"task_id": "a/1", "prompt": "x"}]


def test_packed_and_plain_rows_come_out_as_they_went_in(tmp_path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.jsonl").write_text(text + "\n", encoding="utf-8")
    write_unpacked(tmp_path / "a.gz", tmp_path)
    write_rows(tmp_path / "b.jsonl", tmp_path)
    for name in ("test.jsonl", "rows.jsonl"):
        assert [row.values for row in read_rows(tmp_path / name)] == ROWS


def test_mbpps_rows_are_taken_out_of_another_harnesses_requests(tmp_path):
    row = {"task_id": 11, "text": "t", "code": "c", "test_list": ["assert 1"], "test_setup_code": ""}
    row["challenge_test_list"] = []
    request = {"request_type": "x", "doc": {**row, "choices": ["c"]}, "label": "c"}
    (tmp_path / "requests.gz").write_bytes(gzip.compress(json.dumps(request).encode()))
    write_mbpp(tmp_path / "requests.gz", tmp_path)
    assert [one.values for one in read_rows(tmp_path / "test.jsonl")] == [row]


def test_no_member_would_take_anothers_place_in_the_cache():
    known = {id(derived): derived for derived, _ in packages.NAMES.values()}.values()
    members = [(d.package.requirement, d.package.kept_as or d.package.member.rpartition("/")[2]) for d in known]
    assert len(set(members)) == len(members)
    assert len({derived.folder for derived in known}) == len(known)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_rows", "columns"),
    [
        ("humaneval", 164, {"task_id", "prompt", "test", "entry_point"}),
        ("mbpp", 500, {"task_id", "text", "test_list"}),
        ("gsm8k/test", 1319, {"question", "answer"}),
        ("gsm8k/train", 7473, {"question", "answer"}),
        ("math/test", 5000, {"problem", "solution", "level"}),
    ],
)
def test_the_published_benchmarks_are_whole(name, num_rows, columns):
    try:
        path = obtain(f"pypi:{name}")
    except DataError as error:
        pytest.skip(str(error))
    rows = read_rows(path)
    assert len(rows) == num_rows
    assert all(columns <= set(row.values) for row in rows)
