"""Labels of steps of the clock task against the program's, by hand."""

import pytest

from recipes.clock.labels import compare, first_error

PROMPT = [{"role": "user", "content": "4 a+3 b-5 c+1:"}]
RIGHT = ["a4+3=7\n", "b7-5=2\n", "c2+1=3\n", "#3"]
WRONG = ["a4+3=7\n", "b7-5=3\n", "c3+1=4\n", "#4"]  # in the second line


def row(completions, labels):
    return {"prompt": PROMPT, "completions": completions, "labels": labels}


@pytest.mark.parametrize(
    ("completions", "labels", "exact", "agreed"),
    [
        (RIGHT, [1.0, 1.0, 1.0, 1.0], 1.0, 1.0),
        (RIGHT, [1.0, 0.5, 0.0, 1.0], 0.0, 0.75),
        (WRONG, [0.5, 0.0, 0.0, 0.0], 1.0, 1.0),
        (WRONG, [1.0, 0.0, None, None], 1.0, 1.0),
        (WRONG, [1.0, 1.0, 0.0, None], 0.0, 0.5),
        (WRONG, [0.0, None, None, None], 0.0, 0.0),
    ],
)
def test_the_first_error_and_the_lines_up_to_it(completions, labels, exact, agreed):
    assert compare([row(completions, labels)]) == (exact, agreed)


def test_shares_are_of_answers_and_of_lines():
    rows = [row(RIGHT, [1.0] * 4), row(WRONG, [0.0, None, None, None])]
    assert compare(rows) == (0.5, 4 / 6)


def test_no_error_is_none():
    assert first_error([1.0, None, 0.25]) is None and first_error([1.0, 0.0, 0.0]) == 1
