"""Completions are in the file as soon as they are finished; what was drawn is never drawn again, nor mixed up."""

import json

import pytest
from benchmark_rows import HUMAN_EVAL, questions_of, write_rows

from meshift.errors import DataError, InputError
from meshift.evaluation.drawn_folder import COMPLETIONS, DRAWING, DrawnFolder
from meshift.evaluation.saved import Saved, as_lines, read_completions

SETTINGS = {"model": "m", "temperature": 0.8, "stop_strings": ("\n#",)}


def three_questions(tmp_path):
    return questions_of(tmp_path, "humaneval", *({**HUMAN_EVAL, "task_id": f"HumanEval/{i}"} for i in range(3)))


def drawn(i, j, text="    return 1"):
    return Saved(id=f"HumanEval/{i}", sample=j, completion=text, prompt_ids=[i], completion_ids=[j, 5])


def test_a_run_that_was_killed_in_the_middle_of_a_line_goes_on(tmp_path):
    questions, prompts = three_questions(tmp_path), [[0], [1], [2]]
    folder = DrawnFolder(tmp_path / "e", SETTINGS)
    assert folder.missing(questions, prompts, 2) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    folder.add([drawn(2, 1), drawn(0, 0)])
    folder.add([drawn(1, 0, "    return 'é'")])
    path = tmp_path / "e" / COMPLETIONS
    whole = path.read_bytes()
    path.write_bytes(whole + as_lines([drawn(0, 1)]).encode()[:40])
    again = DrawnFolder(tmp_path / "e", SETTINGS)
    assert path.read_bytes() == whole
    assert again.num_kept == 3
    assert again.missing(questions, prompts, 2) == [(0, 1), (1, 1), (2, 0)]
    again.add([drawn(2, 0), drawn(1, 1), drawn(0, 1)])
    found = again.finish(questions, 2)
    assert [[(one.id[-1], one.sample) for one in of_one] for of_one in found] == [
        [("0", 0), ("0", 1)],
        [("1", 0), ("1", 1)],
        [("2", 0), ("2", 1)],
    ]
    assert read_completions(path, questions) == found


def test_fewer_questions_or_samples_leave_the_others_in_the_file(tmp_path):
    questions, prompts = three_questions(tmp_path), [[0], [1], [2]]
    folder = DrawnFolder(tmp_path / "e", SETTINGS)
    folder.add([drawn(i, j) for i in range(3) for j in range(2)])
    assert folder.missing(questions[:2], prompts[:2], 1) == []
    assert len(folder.finish(questions[:2], 1)) == 2
    assert len((tmp_path / "e" / COMPLETIONS).read_text().splitlines()) == 6
    assert DrawnFolder(tmp_path / "e", SETTINGS).missing(questions, prompts, 3) == [(0, 2), (1, 2), (2, 2)]


def test_what_was_drawn_otherwise_is_not_gone_on_with(tmp_path):
    folder = tmp_path / "e"
    DrawnFolder(folder, SETTINGS).add([drawn(0, 0)])
    with pytest.raises(InputError, match=r"drawn with temperature 0.8, and it is 1.0 now.*--output"):
        DrawnFolder(folder, SETTINGS | {"temperature": 1.0})
    with pytest.raises(InputError, match=r"drawn with top_p None, and it is 0.9 now"):
        DrawnFolder(folder, SETTINGS | {"top_p": 0.9})
    with pytest.raises(InputError, match="'HumanEval/0', whose prompt is another one now"):
        DrawnFolder(folder, SETTINGS).missing(three_questions(tmp_path)[:1], [[7]], 1)
    (folder / DRAWING).unlink()
    with pytest.raises(InputError, match=f"no {DRAWING} that says how"):
        DrawnFolder(folder, SETTINGS)


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output .*file cannot be used"):
        DrawnFolder(tmp_path / "file", SETTINGS)


def test_human_evals_own_sample_files_are_read(tmp_path):
    """`task_id` and `completion`, samples of a question one after another or not."""
    questions = three_questions(tmp_path)[:2]
    path = tmp_path / "samples.jsonl"
    rows = [("HumanEval/1", "a"), ("HumanEval/0", "b"), ("HumanEval/1", "c")]
    path.write_text("".join(json.dumps({"task_id": name, "completion": text}) + "\n" for name, text in rows))
    first, second = read_completions(path, questions)
    assert [(one.sample, one.completion) for one in first] == [(0, "b")]
    assert [(one.sample, one.completion) for one in second] == [(0, "a"), (1, "c")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"task_id": "HumanEval/9", "completion": ""}, "no question of the data has the id 'HumanEval/9'"),
        ({"completion": ""}, "'id' and 'completion'"),
        ({"id": "HumanEval/0", "completion": None}, "'id' and 'completion'"),
        ({"id": "HumanEval/0", "completion": "", "sample": "x"}, "'sample' is 'x'"),
        ({"id": "HumanEval/0", "completion": "", "prompt_ids": ["x"]}, "lists of token ids"),
    ],
)
def test_a_line_that_is_no_completion_is_named(tmp_path, line, words):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=words) as caught:
        read_completions(path, three_questions(tmp_path)[:1])
    assert "samples.jsonl:1" in str(caught.value)


def test_a_question_without_a_completion_is_named_and_a_limit_passes_over_the_others(tmp_path):
    questions = three_questions(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_text(as_lines([drawn(0, 0), drawn(1, 0)]))
    with pytest.raises(DataError, match="no completion of 'HumanEval/2'"):
        read_completions(path, questions)
    assert len(read_completions(path, questions[:1], all_questions=False)) == 1


def test_a_sample_that_stands_in_a_file_twice_is_refused_and_lines_without_a_number_are_samples(tmp_path):
    questions = three_questions(tmp_path)[:1]
    name, path = questions[0].id, tmp_path / "mine.jsonl"
    write_rows(path, [{"id": name, "sample": j, "completion": "x"} for j in (0, 1, 0)])
    with pytest.raises(DataError, match=rf"mine.jsonl:3: a line before this has sample 0 of '{name}'"):
        read_completions(path, questions)
    write_rows(path, [{"task_id": name, "completion": text} for text in ("x", "x", "y")])  # as HumanEval's own
    [found] = read_completions(path, questions)
    assert [(one.sample, one.completion) for one in found] == [(0, "x"), (1, "x"), (2, "y")]
