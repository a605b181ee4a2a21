import pytest

from meshift.data.rows import count_rows, read_rows
from meshift.errors import DataError

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def write(tmp_path):
    from pyarrow import parquet

    def write(rows, name="a.parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name, row_group_size=3)
        return tmp_path / name

    return write


def test_rows_would_lose_their_order_their_nesting_or_their_numbers(write):
    rows = [{"prompt": [{"role": "user", "content": f"é{n}"}], "extra": {"n": n, "x": None}} for n in range(8)]
    path = write(rows)
    assert [row.values for row in read_rows(path)] == rows
    assert [row.where for row in read_rows(path)] == [f"{path}:row {n}" for n in range(1, 9)]


def test_a_table_larger_than_a_batch_would_lose_rows(write):
    path = write([{"n": n} for n in range(2500)])
    assert [row.values["n"] for row in read_rows(path)] == list(range(2500))
    assert count_rows(path) == 2500


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table at all, nothing of the kind"])
def test_what_is_no_parquet_file_would_give_a_traceback(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet is no Parquet file that can be read"):
        read_rows(tmp_path / "a.parquet")


def test_one_of_two_columns_of_one_name_would_be_taken(tmp_path):
    from pyarrow import parquet

    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has more than one column 'text'"):
        read_rows(tmp_path / "a.parquet")


def test_a_torn_parquet_file_would_give_a_traceback(write):
    path = write([{"n": n} for n in range(2500)])
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(DataError, match="is no Parquet file that can be read"):
        read_rows(path)


def test_a_table_without_rows_would_train_on_nothing(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no rows"):
        read_rows(tmp_path / "a.parquet")


def test_columns_as_other_tools_write_them_would_be_no_texts(tmp_path, tokenizer):
    from pyarrow import parquet

    from meshift.data.preferences import load_preferences

    columns = {
        "prompt": pyarrow.array(["Q:", "Q:"], pyarrow.large_string()),
        "chosen": pyarrow.array([" yes", " yes"]).dictionary_encode(),
        "rejected": pyarrow.array([" no", " never"], pyarrow.string_view()),
        "margin": pyarrow.array([1, None], pyarrow.float16()),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    data = load_preferences(str(tmp_path / "a.parquet"), tokenizer, max_length=50)
    assert [tokenizer.decode(pair.rejected) for pair in data.pairs] == ["Q: no<|im_end|>", "Q: never<|im_end|>"]
    assert [pair.margin for pair in data.pairs] == [1.0, None]
