"""Answer by answer what the reward function `maths` takes for right: the table is mathematics, not its word."""

import pytest

pytest.importorskip("math_verify")

from meshift.rewards.maths import maths
from meshift.rewards.mixed_numbers import as_fractions

MIXED = [
    (r"\boxed{1\frac{1}{2}}", "3/2", 1),
    (r"So $1\frac{1}{2}$.", "1.5", 1),
    (r"It is 1\frac{1}{2}", "3/2", 1),
    ("It is 1 1/2.", "3/2", 1),
    (r"\boxed{1 1/2}", r"\frac{3}{2}", 1),
    (r"\boxed{1 \dfrac{1}{2}}", "3/2", 1),
    (r"\boxed{2\frac34}", "11/4", 1),
    (r"\boxed{-1\frac{1}{2}}", "-3/2", 1),
    (r"\boxed{-1\frac{1}{2}}", "-1/2", 0),
    ("It is -1 1/2", "-1.5", 1),
    (r"\boxed{\frac{3}{2}}", r"1\frac{1}{2}", 1),
    ("It is 1.5", "1 1/2", 1),
    (r"\boxed{\frac{1}{2}}", r"1\frac{1}{2}", 0),
    (r"\boxed{\frac{11}{2}}", r"1\frac{1}{2}", 0),
    (r"\boxed{\frac{11}{2}}", "1 1/2", 0),
    (r"\boxed{2\cdot\frac{1}{2}}", "1", 1),
    (r"\boxed{2\cdot\frac{1}{2}}", "5/2", 0),
    (r"\boxed{x^2\frac{1}{2}}", r"\frac{x^2}{2}", 1),
    (r"\boxed{3 - 1\frac{1}{2}}", "3/2", 1),
    (r"\boxed{[1\frac{1}{2}, 2]}", "[3/2, 2]", 1),
    (r"\boxed{(1 1/2, 2)}", r"(\frac{3}{2}, 2)", 1),
]
FRACTIONS = [
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 1),
    (r"\boxed{\tfrac12}", "0.5", 1),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}", 1),
    (r"\boxed{\frac{2}{4}}", "1/2", 1),
    (r"\boxed{.5}", "1/2", 1),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
    (r"\boxed{x = 3}", "3", 1),
    (r"\boxed{3}", "x=3", 1),
]
THOUSANDS = [
    (r"\boxed{1{,}000}", "1000", 1),
    ("So $12{,}345$.", 12345, 1),
    (r"\boxed{1,\!000}", "1000", 1),
    ("It is 1,000", "1000", 1),
    (r"\boxed{1000}", "1,000", 1),
    (r"\boxed{1000}", r"1{,}000", 1),
    (r"\boxed{1,000}", "1", 0),
    (r"\boxed{1{,}000}", "0", 0),
]
PERCENT = [
    (r"\boxed{25\%}", r"25\%", 1),
    ("It is 25%", "25%", 1),
    (r"\boxed{25\%}", "0.25", 1),
    (r"\boxed{0.25}", "25%", 1),
    (r"\boxed{25\%}", "26%", 0),
]
UNITS = [
    (r"\boxed{18\text{ cm}}", "18", 1),
    (r"\boxed{18 \text{ cm}^2}", "18", 1),
    (r"\boxed{18\ \mathrm{cm}}", "18", 1),
    (r"\boxed{18}", r"18\text{ cm}", 1),
    (r"\boxed{17\text{ cm}}", "18", 0),
    (r"\boxed{1\frac{1}{2}\text{ cups}}", "3/2", 1),
    (r"\boxed{\$18}", "18", 1),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{\text{Monday}}", r"\text{Monday}", 1),
    (r"\boxed{\text{Friday}}", r"\text{Monday}", 0),
    (r"\boxed{\text{(B)}}", r"\text{(B)}", 1),
    (r"\boxed{\text{(A)}}", r"\text{(B)}", 0),
]
CURRENCIES = [
    (r"\boxed{42}", r"\$42", 1),
    (r"\boxed{\$42}", r"\$42", 1),
    (r"\boxed{43}", r"\$42", 0),
    (r"\boxed{32,348}", r"\$32,\!348", 1),
    (r"\boxed{1/2}", r"\$\frac{1}{2}", 1),
    (r"It is \$18.90.", "18.9", 1),
    (r"It is $\$18.90$.", r"$\$18.9$", 1),
    (r"It is \$18.90.", "90", 0),
]
SEVERAL_BOXES = [
    (r"First \boxed{2} apples, then \boxed{5}.", "5", 1),
    (r"First \boxed{2} apples, then \boxed{5}.", "2", 0),
    (r"First $\boxed{2}$ apples, then $\boxed{5}$.", "5", 1),
    ("The sum is \\boxed{7}.\nNo: \\boxed{8}", "8", 1),
    ("The sum is \\boxed{7}.\nNo: \\boxed{8}", "7", 0),
    (r"\boxed{1} \boxed{2} \boxed{3}", "1,2,3", 1),
    (r"\boxed{1} \boxed{2} \boxed{3}", "2", 0),
    (r"x = \boxed{1} and y = \boxed{2}", "1,2", 1),
    (r"x = \boxed{1} and y = \boxed{2}", "2", 0),
    (r"$x = \boxed{1}$ or $x = \boxed{2}$", "2", 0),
]
INTERVALS = [
    (r"\boxed{[0,1)}", "[0,1)", 1),
    (r"\boxed{\left[0, 1\right)}", "[0,1)", 1),
    (r"\boxed{(0,1)}", "[0,1)", 0),
    (r"\boxed{[0,1]}", "[0,1)", 0),
    (r"\boxed{(-\infty, 2]}", r"(-\infty,2]", 1),
    (r"\boxed{(-\infty, 2)}", r"(-\infty,2]", 0),
    (r"\boxed{[2,3] \cup [0,1]}", r"[0,1]\cup[2,3]", 1),
    (r"\boxed{[0,1]}", r"[0,1]\cup[2,3]", 0),
]
SETS = [
    (r"\boxed{\{1,2\}}", r"\{2,1\}", 1),
    (r"\boxed{2, 1}", "1,2", 1),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}", 0),
    (r"\boxed{1}", r"\{1,2\}", 0),
    (r"\boxed{(2,1)}", "(1,2)", 0),
    (r"\boxed{\{1\frac{1}{2}, 2\}}", r"\{2, 3/2\}", 1),
]


@pytest.mark.parametrize(
    ("answer", "truth", "verdict"),
    [*MIXED, *FRACTIONS, *THOUSANDS, *PERCENT, *UNITS, *CURRENCIES, *SEVERAL_BOXES, *INTERVALS, *SETS],
)
def test_an_answer_is_right_where_it_is_the_same_object(answer, truth, verdict):
    assert maths(answer, truth) == verdict


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
        (r"-1\tfrac12 and 2 3/4", r"-\frac{3}{2} and 11/4"),
        (r"1,000\frac{1}{2}", r"\frac{2001}{2}"),
        (r"12\frac{0}{5}", r"\frac{60}{5}"),
        ("a 3 1/2-hour trip", "a 7/2-hour trip"),
    ],
)
def test_mixed_numbers_become_fractions_of_the_same_form(text, expected):
    assert as_fractions(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        r"x^2\frac{1}{2}",
        r"x_1\frac{1}{2}",
        r"2\cdot\frac{1}{2}",
        r"2\frac{x}{3}",
        r"\sqrt{2}\frac{1}{2}",
        r"1.5\frac{1}{2}",
        "2 4/2",
        "on 3 1/2/2020",
        "1 000/3",
        "7 1/2.5",
        "x2 1/2",
        "1/2",
    ],
)
def test_what_is_no_mixed_number_stays(text):
    assert as_fractions(text) == text
