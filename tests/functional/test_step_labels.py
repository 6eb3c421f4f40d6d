"""Labels of steps: expectations by enumeration, the bisection for every length and position."""

import math

import pytest

from trl_ext.functional import STEP_LABELS, first_error, rollouts_for, search_together


def expectation(label, finish_rate, rollouts):
    """Over all outcomes of the rollouts."""
    return sum(
        math.comb(rollouts, right)
        * finish_rate**right
        * (1 - finish_rate) ** (rollouts - right)
        * label(right, rollouts)
        for right in range(rollouts + 1)
    )


@pytest.mark.parametrize("rollouts", [1, 2, 8])
@pytest.mark.parametrize("finish_rate", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_the_soft_label_averages_to_the_value_and_the_hard_one_to_the_chance_of_one_success(finish_rate, rollouts):
    assert expectation(STEP_LABELS["soft"], finish_rate, rollouts) == pytest.approx(finish_rate, abs=1e-12)
    alive = 1 - (1 - finish_rate) ** rollouts
    assert expectation(STEP_LABELS["hard"], finish_rate, rollouts) == pytest.approx(alive, abs=1e-12)


def test_labels_by_hand():
    assert [STEP_LABELS["soft"](right, 4) for right in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [STEP_LABELS["hard"](right, 4) for right in range(5)] == [0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("finish_rate", [0.01, 0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("error", [0.5, 0.125, 0.05, 0.001])
def test_so_many_rollouts_are_enough_and_one_fewer_is_not(finish_rate, error):
    rollouts = rollouts_for(finish_rate, error)
    assert (1 - finish_rate) ** rollouts <= error and rollouts >= 1
    assert rollouts == 1 or (1 - finish_rate) ** (rollouts - 1) > error


def test_rollouts_by_hand():
    assert rollouts_for(0.5, 0.125) == 3 and rollouts_for(0.1, 0.05) == 29 and rollouts_for(1.0, 0.01) == 1


@pytest.mark.parametrize(("finish_rate", "error"), [(0.0, 0.1), (1.1, 0.1), (math.nan, 0.1), (0.5, 0.0), (0.5, 1.0)])
def test_a_rate_or_an_error_out_of_range_is_refused(finish_rate, error):
    with pytest.raises(ValueError, match="must be in"):
        rollouts_for(finish_rate, error)


@pytest.mark.parametrize("num_steps", range(1, 18))
def test_the_first_dead_step_is_found_in_as_few_questions_as_its_place_has_bits(num_steps):
    for place in range(num_steps):
        asked = []

        def are_dead(questions, place=place, asked=asked):
            asked.extend(questions)
            return [steps > place for _, steps in questions]

        assert search_together([first_error(num_steps)], are_dead) == [place]
        assert len(asked) <= math.ceil(math.log2(num_steps))
        assert all(0 < steps < num_steps for _, steps in asked), "the ends are known"


def test_many_answers_are_searched_in_as_many_rounds_as_the_longest_one():
    places = [(num_steps, place) for num_steps in range(1, 18) for place in range(num_steps)]
    rounds = []

    def are_dead(questions):
        rounds.append(questions)
        return [steps > places[i][1] for i, steps in questions]

    found = search_together([first_error(num_steps) for num_steps, _ in places], are_dead)
    assert found == [place for _, place in places]
    assert len(rounds) == 5 and all(len({i for i, _ in questions}) == len(questions) for questions in rounds)


def test_no_answer_is_no_question():
    assert search_together([], lambda questions: pytest.fail("a question")) == []
