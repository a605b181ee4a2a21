"""With the real `datasets` library, where it is installed (`pip install 'meshift[data]'`)."""

import pytest

from meshift.data.dataset import dataset_rows
from meshift.data.demonstrations import load_demonstrations
from meshift.data.prompts import load_prompts
from meshift.errors import DataError

datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": [{"role": "user", "content": f"{n} + 1?"}], "reward_model": {"ground_truth": str(n + 1)}, "n": n}
    for n in range(5)
]


@pytest.fixture
def folder(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    splits = {"train": datasets.Dataset.from_list(ROWS[:3]), "test": datasets.Dataset.from_list(ROWS[3:])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    return tmp_path


def test_a_saved_dataset_would_lose_rows_or_nested_columns(folder):
    rows = list(dataset_rows(str(folder / "one")))
    assert [row.values for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{folder / 'one'}:row {n}" for n in range(1, 6)]


@pytest.mark.parametrize(
    ("name", "expected"), [("two", [0, 1, 2]), ("two:test", [3, 4]), ("two:test[1:]", [4]), ("one[:40%]", [0, 1])]
)
def test_a_split_or_slice_of_a_saved_dataset_would_be_another(folder, name, expected):
    assert [row.values["n"] for row in dataset_rows(str(folder / name))] == expected


def test_verl_rows_of_a_saved_dataset_would_not_load(folder, tokenizer):
    data = load_prompts(str(folder / "two:test"), tokenizer, max_prompt_length=100)
    assert [prompt.columns["ground_truth"] for prompt in data.prompts] == ["4", "5"]
    assert data.prompts[0].messages == ROWS[3]["prompt"]


def test_nulls_of_another_rows_columns_would_be_taken_for_values(tmp_path, tokenizer):
    rows = [{"text": "a", "label": None}, {"text": "b", "label": 1}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "nulls"))
    found = load_demonstrations(str(tmp_path / "nulls"), tokenizer, max_length=9, loss_on="all")
    assert len(found.demonstrations) == 2


def test_a_dataset_saved_without_rows_would_give_a_traceback(tmp_path):
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"empty (has no rows|cannot be read by `datasets`)"):
        list(dataset_rows(str(tmp_path / "empty")))


def test_a_torn_folder_or_wrong_split_would_give_a_traceback(folder):
    with pytest.raises(DataError, match=r"two has no split 'dev': name one of test, train, as .*two:test"):
        list(dataset_rows(str(folder / "two:dev")))
    with pytest.raises(DataError, match="one dataset without splits: leave out 'dev'"):
        list(dataset_rows(str(folder / "one:dev")))
    for name in ("dataset_info.json", "state.json"):
        (folder / "one" / name).write_text("{")
        with pytest.raises(DataError, match="cannot be read by `datasets`"):
            list(dataset_rows(str(folder / "one")))


def test_an_unreachable_hub_would_give_a_traceback():
    with pytest.raises(DataError, match=r"no-such-org/no-such-data is no local file or folder, and `datasets`"):
        list(dataset_rows("no-such-org/no-such-data"))


def test_rows_saved_as_numpy_arrays_would_be_no_lists_and_numbers(tmp_path, tokenizer):
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(str(tmp_path / "numpy"))
    assert [row.values for row in dataset_rows(str(tmp_path / "numpy"))] == ROWS
    data = load_prompts(str(tmp_path / "numpy[:1]"), tokenizer, max_prompt_length=100)
    assert data.prompts[0].columns["ground_truth"] == "1"
