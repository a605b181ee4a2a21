import json
import sys

import pytest

from meshift.counted import heard_by
from meshift.data.dataset import dataset_rows
from meshift.data.preferences import load_preferences
from meshift.errors import DataError


@pytest.fixture
def numbers(write_rows):
    return write_rows(*({"n": n} for n in range(10)))


def test_a_slice_would_give_other_rows_or_other_lines(numbers):
    rows = list(dataset_rows(f"{numbers}[7:]"))
    assert [row.values["n"] for row in rows] == [7, 8, 9]
    assert [row.where for row in rows] == [f"{numbers}:{line}" for line in (8, 9, 10)]


def test_a_slice_without_rows_would_train_on_nothing(numbers):
    with pytest.raises(DataError, match=r"rows\.jsonl\[10:\]: the slice leaves no row"):
        list(dataset_rows(f"{numbers}[10:]"))


def test_a_bad_row_behind_the_slice_would_stop_the_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\nbroken')
    assert len(list(dataset_rows(f"{path}[:1]"))) == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2: bad JSON"):
        list(dataset_rows(str(path)))


def test_a_split_of_a_file_would_be_ignored(numbers):
    with pytest.raises(DataError, match="only folders and hub ids have splits"):
        list(dataset_rows(f"{numbers}:train"))


def test_a_folder_that_datasets_did_not_write_would_be_given_to_it(tmp_path):
    with pytest.raises(DataError, match="none that `datasets` wrote with save_to_disk"):
        list(dataset_rows(str(tmp_path)))


@pytest.mark.parametrize("module", ["datasets", "pyarrow"])
def test_a_missing_library_would_give_a_traceback(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "a.parquet").write_text("")
    names = {"datasets": [str(tmp_path), "org/name"], "pyarrow": [str(tmp_path / "a.parquet")]}[module]
    for name in names:
        with pytest.raises(DataError, match=r"install it with pip install 'meshift\[data\]'"):
            list(dataset_rows(name))


class FakeDatasets:
    """In place of the library: it remembers what it was asked for."""

    class exceptions:  # noqa: N801 - the library's own name
        class DatasetsError(Exception):
            pass

    def __init__(self, found):
        self.found, self.asked = found, []

    def load_dataset(self, *arguments):
        self.asked.append(arguments)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("org/name", ("org/name", None), [1, 2]),
        ("org/name:test", ("org/name", None), [3]),
        ("org/name/main:test", ("org/name", "main"), [3]),
        ("org/name[1:]", ("org/name", None), [2]),
    ],
)
def test_a_hub_id_would_ask_for_another_config_or_split(monkeypatch, name, asked, expected):
    fake = FakeDatasets({"test": [{"n": 3}], "train": [{"n": 1}, {"n": 2}]})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    rows = list(dataset_rows(name))
    assert fake.asked == [asked]
    assert [row.values["n"] for row in rows] == expected
    assert rows[-1].where.startswith(name.partition("[")[0])
    assert rows[-1].where.endswith(f"row {2 if 2 in expected else 1}")


def test_a_lone_split_of_any_name_would_have_to_be_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets({"validation": [{"n": 3}]}))
    assert [row.values["n"] for row in dataset_rows("org/name")] == [3]


@pytest.mark.parametrize(
    ("found", "name", "message"),
    [
        ({"a": [], "b": []}, "org/name", r"org/name has no split 'train': name one of a, b, as org/name:a"),
        ({"a": [], "b": []}, "org/name:c", "has no split 'c'"),
        (ConnectionError("no route\nto host"), "org/name", r"cannot get it from the hub \(no route\): check"),
        (FakeDatasets.exceptions.DatasetsError("gone"), "org/name", r"no local file or folder.*\(gone\)"),
        ({"train": []}, "org/name", "org/name has no rows"),
    ],
)
def test_what_the_hub_has_not_would_give_a_traceback(monkeypatch, found, name, message):
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(found))
    with pytest.raises(DataError, match=message):
        list(dataset_rows(name))


def test_one_file_would_not_serve_as_training_and_held_out_data(write_rows, tokenizer):
    path = write_rows(*({"prompt": "a", "chosen": str(n), "rejected": "x"} for n in range(9)))
    train, heldout = (load_preferences(f"{path}[{s}]", tokenizer, max_length=9).pairs for s in (":7", "7:"))
    assert [int(pair.where.rpartition(":")[2]) for pair in train + heldout] == list(range(1, 10))
    assert json.loads(tokenizer.decode(heldout[0].chosen[1:2])) == 7


@pytest.mark.parametrize(
    ("part", "kept", "total"), [("", 12, 12), ("[:5]", 5, 5), ("[90%:]", 1, 1), ("[3:100]", 9, 9)]
)
def test_many_rows_tell_how_many_are_read_and_of_how_many(tmp_path, monkeypatch, part, kept, total):
    monkeypatch.setattr("meshift.counted.PATIENCE_S", 0.0)
    monkeypatch.setattr("meshift.counted.BETWEEN_S", 0.0)
    path, told = tmp_path / "rows.jsonl", []
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(12)))
    with heard_by(lambda *count: told.append(count)):
        assert len(list(dataset_rows(f"{path}{part}"))) == kept
    assert told[0] == (f"rows of {path}{part}", 1, total)
    assert told[-1] == (f"rows of {path}{part}", kept, kept)


def test_rows_whose_number_is_not_known_are_told_too(tmp_path, monkeypatch):
    monkeypatch.setattr("meshift.counted.PATIENCE_S", 0.0)
    monkeypatch.setattr("meshift.counted.BETWEEN_S", 0.0)
    path, told = tmp_path / "rows.csv", []
    path.write_text("n\n1\n2\n")
    with heard_by(lambda *count: told.append(count)):
        list(dataset_rows(str(path)))
    assert told[0] == (f"rows of {path}", 1, None)
