import json

import pytest

from meshift.data.rows import did_you_mean, iter_rows, read_rows
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


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b"a\n1\n"), ("a.jsonl", b'{"a": "1"}\n'), ("a.json", b'[{"a": "1"}]'), ("A.CSV", b"a\n1\n")],
)
def test_a_byte_order_mark_or_carriage_returns_would_become_part_of_a_column(tmp_path, name, content):
    for data in (content, b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n")):
        assert [row.values for row in read_rows(write(tmp_path / name, data))] == [{"a": "1"}]


def test_files_with_marks_put_behind_one_another_would_be_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": "1"}\n' * 2)
    assert [row.values for row in read_rows(path)] == [{"a": "1"}] * 2


@pytest.mark.parametrize("content", [",a,b\n0,x,y\n", "a,b,\nx,y,\n", ",a,,b\n0,x,,y\n"])
def test_columns_without_a_name_as_pandas_writes_them_would_be_refused(tmp_path, content):
    assert [row.values for row in read_rows(write(tmp_path / "a.csv", content))] == [{"a": "x", "b": "y"}]


def test_a_list_under_data_would_have_to_be_taken_out_first(tmp_path):
    path = write(tmp_path / "a.json", '{"version": 2, "data": [{"a": 1}, {"a": 2}]}')
    assert [(row.values, row.where) for row in read_rows(path)] == [
        ({"a": 1}, f"{path}:row 1"),
        ({"a": 2}, f"{path}:row 2"),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_json_lines_under_the_name_of_json_would_be_refused(tmp_path, newline):
    path = write(tmp_path / "a.json", f'\ufeff{newline}{{"a": 1}}{newline}{{"a": 2}}{newline}')
    assert [row.values for row in read_rows(path)] == [{"a": 1}, {"a": 2}]
    place = 1 + newline.count("\n")
    assert read_rows(path)[0].where == f"{path}:{place}"


def test_a_long_csv_field_or_a_blank_line_before_the_header_would_be_refused(tmp_path):
    book = "word, " * 50_000
    path = write(tmp_path / "a.csv", f'\n\na,b\n"{book}",1\n')
    assert [(row.values, row.where) for row in read_rows(path)] == [({"a": book, "b": "1"}, f"{path}:4")]


def test_messages_in_a_csv_cell_would_stay_a_text_and_texts_in_brackets_would_not(tmp_path):
    cells = [
        '[{"role": "user", "content": "Hi"}]',
        "[sic] a film",
        "{not json}",
        "[1, 2]",
        '{"ground_truth": "4"}',
    ]
    quoted = "\n".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    path = write(tmp_path / "a.csv", f"a\n{quoted}\n")
    assert [row.values["a"] for row in read_rows(path)] == [
        [{"role": "user", "content": "Hi"}],
        *cells[1:4],
        {"ground_truth": "4"},
    ]


def test_lines_behind_the_one_that_is_wanted_would_be_read(tmp_path):
    rows = iter_rows(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\nbroken'))
    assert [next(rows).values["a"] for _ in range(2)] == [1, 2]
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        next(rows)


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
        ("a.json", "\ufeff\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", ",,\n1,2,3", "a.csv:1: bad CSV header .no column has a name"),
        ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 200_000, "a.jsonl:2: bad JSON"),
        ("a.json", '[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", "a.json:2: bad JSON"),
        ("a.json", '[{"a": 1},\n{"a": ' + "[" * 200_000, "a.json:2: bad JSON"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "a.jsonl:2: .*the key 'a' stands there twice"),
        ("a.jsonl", '{"a": 1}\n{"a": "x\\ud800y"}', r"a.jsonl:2: .*\\ud800 is half a character"),
        ("a.json", '[{"a": 1},\n\n{"b": {"a": 1, "a": 2}}]', "a.json:3: .*the key 'a' stands there twice"),
        ("a.json", '{"data": [{"a": 1},\n{"a": "\\udfff"}]}', r"a.json:2: .*is half a character"),
        ("a.json", b'[\n{"a": "\xff"}]', "a.json:2: byte 0xff is not UTF-8"),
        ("a.json", '{"data": 3}', "a.json:1: this JSON is an object"),
        ("a.json", '{"a": 1}\n{"a": ', "a.json:2: bad JSON"),
        ("a.json", '{"a": 1}\n[2]', "a.json:2: the row is a list"),
        ("a.json", '{"a": 1}\n\n{"a": 1, "a": 2}', "a.json:3: .*the key 'a' stands there twice"),
        ("a.json", '{\n"a": 1}\n{\n"a": 2}', "a.json:3: bad JSON .*: write a list of objects"),
        ("a.csv", "\n\na,a\n", "a.csv:3: bad CSV header"),
        ("a.jsonl", "\xef".encode("utf-16"), "a.jsonl:1: byte 0xff is not UTF-8"),
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


def test_a_pair_of_surrogates_would_be_taken_for_halves(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00"}')
    assert read_rows(path)[0].values == {"a": "\N{GRINNING FACE}"}


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
