import json

import pytest

from meshift.data.rows import did_you_mean, read_rows
from meshift.errors import DataError


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_three_formats_would_not_give_the_same_rows(tmp_path):
    values = [{"prompt": "one, two", "answer": "a"}, {"prompt": "zwölf\nlines", "answer": 'quo"te'}]
    jsonl = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(value) for value in values))
    plain = write(tmp_path / "a.json", json.dumps(values, indent=1))
    table = write(tmp_path / "a.csv", 'prompt,answer\n"one, two",a\n"zwölf\nlines","quo""te"\n')
    for path in (jsonl, plain, table):
        assert [row.values for row in read_rows(path)] == values


def test_a_row_would_be_reported_on_a_wrong_line(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    table = write(tmp_path / "a.csv", 'a,b\n"x\ny",1\nz,2\n')
    plain = write(tmp_path / "a.json", '[{"a": 1}, {"a": 2}]')
    assert [row.where for row in read_rows(jsonl)] == [f"{jsonl}:1", f"{jsonl}:3"]
    assert [row.where for row in read_rows(table)] == [f"{table}:2", f"{table}:4"]
    assert [row.where for row in read_rows(plain)] == [f"{plain}:row 1", f"{plain}:row 2"]


def test_a_line_separator_inside_a_string_would_split_the_row(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False))
    assert read_rows(path)[0].values == {"a": "x\u2028y\x85z"}


def test_a_byte_order_mark_would_become_part_of_a_column_name(tmp_path):
    assert read_rows(write(tmp_path / "a.csv", b"\xef\xbb\xbfa\n1\n"))[0].values == {"a": "1"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": ', "a.jsonl:2: bad JSON"),
        ("a.jsonl", '{"a": 1}\n[1]', "a.jsonl:2: the row is a list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "a.jsonl:2: byte 0xff is not UTF-8"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", '[{"a": 1},\n{]', "a.json:2: bad JSON"),
        ("a.json", '{"a": 1}', "a.json:1: this JSON is an object"),
        ("a.json", '[{"a": 1}, "b"]', "a.json:row 2: the row is a string"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 200_000, "a.jsonl:2: bad JSON"),
        ("a.json", '[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", "a.json:2: bad JSON"),
        ("a.json", '[{"a": 1},\n{"a": ' + "[" * 200_000, "a.json:2: bad JSON"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv:3: 1 fields under 2 columns"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: bad CSV header.*'a' stands there twice"),
        ("a.csv", 'a,b\n1,2\n"x,3\n', "a.csv:3: bad CSV"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.txt", "hello", "of no known format"),
    ],
)
def test_a_broken_file_would_be_reported_without_its_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_misspelt_file_would_get_no_suggestion(tmp_path):
    write(tmp_path / "prompts.jsonl", "{}")
    with pytest.raises(DataError, match=r"does not exist: did you mean .*prompts\.jsonl\?"):
        read_rows(tmp_path / "promts.jsonl")
    with pytest.raises(DataError, match="nor does its folder"):
        read_rows(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


def test_a_suggestion_would_not_end_its_sentence():
    assert did_you_mean("lerning_rate", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert did_you_mean("zzz", ["learning_rate"]) == "."
