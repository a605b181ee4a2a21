"""The number in an answer, and whether it is the right one."""

from decimal import Decimal

import pytest

from meshift.evaluation.answers import final_number, is_right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 dogs have <<2*4=8>>8 legs.\n#### 8", 8),
        ("#### $1,234.50 in all, of 2000", "1234.50"),
        ("first #### 3\nthen again\n#### 4", 4),
        ("It is \\boxed{-7} of 12.", -7),
        ("So 3 + 4 = 7.", 7),
        ("It costs $18.", 18),
        ("Profit of 70,000 dollars", 70000),
        ("1,2,3", 3),
        ("1,234,567", 1234567),
        ("about 25%", 25),
        (".5 is a half", "0.5"),
        ("#### none\nbut 5 before", None),
        ("#### Step 1\nadd\n#### Answer\n42", 42),
        ("#### Answer\n\n**$42** in all, of 50", 42),
        ("#### 3\nand then\n#### done", 3),
        ("#### 3\n#### 4", 4),
        ("#### none\n#### 4", 4),
        ("2-18", 18),
        ("#### -18", -18),
        ("it is -18", -18),
        ("20 - 2 = $18-$0", 0),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("So $\\boxed{\\dfrac{36}{2}}$, not 7", 18),
        ("\\boxed{\\text{18 dollars}} of 20", 18),
        ("\\boxed{-\\frac{3}{4}}", "-0.75"),
        ("#### 3/4", "0.75"),
        ("#### 3/0", None),
        ("#### 40/day", 40),
        ("\\boxed{1\\frac{1}{2}}", "1.5"),
        ("\\boxed{-1\\frac{1}{2}}", "-1.5"),
        ("\\boxed{2\\frac34}", "2.75"),
        ("\\boxed{\\frac34}", "0.75"),
        ("\\boxed{2 \\dfrac{3}{4}\\text{ cups}} of 3", "2.75"),
        ("#### 1 1/2", "1.5"),
        ("#### -1 1/2 hours", "-1.5"),
        ("#### 5 2/1", 5),
        ("#### 2 / 4", "0.5"),
        ("\\boxed{1{,}000}", 1000),
        ("It is $12{,}000$.", 12000),
        ("\\boxed{1,\\!234}", 1234),
        ("\\boxed{\\$1\\,000}", 1000),
        ("#### Step 1: take 2\nSo 2 + 3.\n#### Step 2: add 5\nThe answer is 42.", 42),
        ("##### **Part 2**\nIt is \\boxed{42}.", 42),
        ("#### Solution with 3 apples\nIt is \\boxed{42}.", 42),
        ("It is \\boxed{41}.\n#### 42", 42),
        ("#### 42, for \\boxed{42} is 40 + 2", 42),
        ("#### Steps: 42", 42),
        ("no number at all", None),
        ("", None),
    ],
)
def test_the_answer_is_what_is_marked_or_else_the_last_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_exactly_whatever_their_form():
    assert is_right("#### $18.00", "18")
    assert is_right("The answer is 1,000", "1000.0")
    assert not is_right("#### 0.30000000000000001", "0.3")
    assert not is_right("eighteen", "18")
