"""Sizes: of files, functions and argument lists. Raise a limit for one place only, with a reason beside it."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MEAN_FUNCTION_LINES = 15
MAX_ARGUMENTS = 8


def lines_of(function) -> int:
    return function.end_lineno - function.lineno + 1


def num_arguments(function) -> int:
    given = function.args
    named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def test_no_file_is_longer_than_a_reader_takes_in_at_once(all_sources):
    long = {s.name: n for s in all_sources if (n := len(s.text.splitlines())) > MAX_FILE_LINES}
    assert not long


def test_no_function_is_longer_than_a_screen(all_sources):
    long = {
        f"{s.name}:{f.lineno} {f.name}": lines_of(f)
        for s in all_sources
        for f in s.functions()
        if lines_of(f) > MAX_FUNCTION_LINES
    }
    assert not long


def test_functions_are_short_on_average(meshift_sources):
    sizes = [lines_of(f) for s in meshift_sources for f in s.functions()]
    assert sum(sizes) / len(sizes) <= MAX_MEAN_FUNCTION_LINES


def test_no_function_takes_more_arguments_than_one_can_remember(meshift_sources):
    greedy = [
        f"{s.name}:{f.lineno} {f.name}"
        for s in meshift_sources
        for f in s.functions()
        if num_arguments(f) > MAX_ARGUMENTS
    ]
    assert not greedy
