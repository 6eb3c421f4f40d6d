"""
Clock arithmetic modulo 10 with the working written out.

A prompt is a start digit and signed moves of 1 to 5, named by letters. An answer is one line per move, then `#` and
the result. A step is one line.

    prompt   4 a+3 b-5:
    answer   a4+3=7
             b7-5=2
             #2
"""

import random
import re
from typing import Any, NamedTuple

LETTERS = "abcdefghi"  # names of the moves, in order; a problem has at most this many
LARGEST_MOVE = 5


class Problem(NamedTuple):
    """A start digit, and the signed moves made from it in order."""

    start: int
    moves: tuple[int, ...]


def random_problem(rng: random.Random, num_moves: int) -> Problem:
    """A problem of `num_moves` moves: start uniform on 0…9, each move uniform on ±1…±5."""
    moves = tuple(rng.choice((-1, 1)) * rng.randint(1, LARGEST_MOVE) for _ in range(num_moves))
    return Problem(rng.randrange(10), moves)


def write_prompt(problem: Problem) -> str:
    """
    The problem as text; `parse_prompt` is its inverse.

    >>> write_prompt(Problem(4, (3, -5)))
    '4 a+3 b-5:'
    """
    if not 1 <= len(problem.moves) <= len(LETTERS):
        raise ValueError(f"A problem has 1 to {len(LETTERS)} moves, got {len(problem.moves)}.")
    moves = [f" {name}{move:+d}" for name, move in zip(LETTERS, problem.moves, strict=False)]
    return f"{problem.start}{''.join(moves)}:"


def parse_prompt(text: str) -> Problem:
    """
    The last problem written in `text`, which may be a bare prompt or a rendered chat.

    >>> parse_prompt("4 a+3 b-5:")
    Problem(start=4, moves=(3, -5))
    """
    found = re.findall(r"([0-9])((?: [a-z][+-][0-9])+):", text)
    if not found:
        raise ValueError(f"No clock problem in the prompt {text!r}; it should contain one such as '4 a+3 b-5:'.")
    start, moves = found[-1]
    return Problem(int(start), tuple(int(move) for move in re.findall(r"[+-][0-9]", moves)))


def correct_values(problem: Problem) -> list[int]:
    """
    The digit shown after each move.

    >>> correct_values(Problem(4, (3, -5, -4)))
    [7, 2, 8]
    """
    values = []
    for move in problem.moves:
        values.append(((values or [problem.start])[-1] + move) % 10)
    return values


def flawed_values(problem: Problem, rng: random.Random, miscarry: float = 0.6, slip: float = 0.05) -> list[int]:
    """
    The digits written by someone who miscounts, each reckoned from the digit written before it.

    Two mistakes: a systematic one, a move that passes 0 (its sum leaves 0…10) comes out one too high; and a random
    one, another digit is written instead. Systematic mistakes add up and do not cancel, so the result tells on them.

    Args:
        problem (`Problem`):
            Start and moves.
        rng (`random.Random`):
            Source of the mistakes; it is advanced.
        miscarry (`float`, *optional*, defaults to `0.6`):
            Probability of the systematic mistake, for each move that passes 0.
        slip (`float`, *optional*, defaults to `0.05`):
            Probability of the random mistake, for each move. The other digits are equally likely.

    Returns:
        `list[int]`: One digit per move.
    """
    values = []
    for move in problem.moves:
        value = (values or [problem.start])[-1] + move
        if not 0 <= value <= 10 and rng.random() < miscarry:
            value += 1
        if rng.random() < slip:
            value += rng.randint(1, 9)
        values.append(value % 10)
    return values


def write_answer(problem: Problem, values: list[int]) -> str:
    r"""
    The working that writes `values`, one digit per move, and repeats the last as the result.

    >>> write_answer(Problem(4, (3, -5)), [7, 2])
    'a4+3=7\nb7-5=2\n#2'
    """
    rows = zip(LETTERS, [problem.start, *values], problem.moves, values, strict=False)
    return "\n".join([*(f"{name}{old}{move:+d}={new}" for name, old, move, new in rows), f"#{values[-1]}"])


def last_text(text_or_messages: Any) -> str:
    """The text of a plain string, or of the last message of a conversation; `""` where there is none."""
    message = text_or_messages[-1] if isinstance(text_or_messages, list) and text_or_messages else text_or_messages
    text = message.get("content") if isinstance(message, dict) else message
    return text if isinstance(text, str) else ""


def written_result(text: str) -> str | None:
    r"""
    The digit behind `#` with which a completion ends, `None` where it ends otherwise.

    >>> written_result("a4+3=7\nb7-5=2\n#2"), written_result("a4+3=7")
    ('2', None)
    """
    found = re.search(r"#([0-9])\s*\Z", text)
    return found and found[1]


def outcome_reward(prompts: list, completions: list, **kwargs) -> list[float]:
    r"""
    1.0 for each completion that ends in `#` and the right digit, else 0.0. The working is not looked at.

    Args:
        prompts (`list`):
            Prompts, plain strings or conversations, each with a clock problem in its (last) text.
        completions (`list`):
            Completions, plain strings or conversations, aligned with `prompts`.
        kwargs:
            Further columns of the data, ignored: the answer is worked out from the prompt.

    Returns:
        `list[float]`: One reward per completion.

    Example:

    >>> outcome_reward(["4 a+3 b-5:", "4 a+3 b-5:"], ["a4+3=7\nb7-5=2\n#2", "#7"])
    [1.0, 0.0]
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        right = correct_values(parse_prompt(last_text(prompt)))[-1]
        rewards.append(float(written_result(last_text(completion)) == str(right)))
    return rewards


def step_rewards(completion_text: str, prompt_text: str) -> list[float]:
    r"""
    One number per written line: 1.0 if the line is right given the lines before it, else 0.0.

    Line i of the first k must name move i, start from the previous *written* value, make the prompt's move and arrive
    where it leads. Line k + 1 must be `#` and the last written value. So a slip costs one line, and the lines that
    reckon on from it correctly lose nothing. A line that writes no value leaves the written value as it was; lines
    after the result are wrong; the end of the text closes a line as `\n` does, so a final `\n` opens none and `""`
    has no lines.

    Args:
        completion_text (`str`):
            The working, any text.
        prompt_text (`str`):
            The prompt, with the problem in it.

    Returns:
        `list[float]`: One reward per line, in order.

    Example:

    >>> step_rewards("a4+3=8\nb8-5=3\n#3", "4 a+3 b-5:")
    [0.0, 1.0, 1.0]
    """
    lines = completion_text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return _line_rewards(lines, parse_prompt(prompt_text))


def process_reward(prompts: list, completions: list, completion_steps: list[list[str]], **kwargs) -> list[list[float]]:
    r"""
    One number per step: 1.0 if the line is right given the lines before it, else 0.0, as in [`step_rewards`].

    A step is a line with the line breaks around it, so empty lines, which are no steps, are forgiven.

    Args:
        prompts (`list`):
            Prompts, plain strings or conversations, each with a clock problem in its (last) text.
        completions (`list`):
            Completions, ignored: their text is that of their steps.
        completion_steps (`list[list[str]]`):
            Text of the steps of each completion, aligned with `prompts`.
        kwargs:
            Further columns of the data, ignored.

    Returns:
        `list[list[float]]`: Rewards of the steps of each completion.

    Example:

    >>> process_reward(["4 a+3 b-5:"], [...], [["a4+3=8\n", "b8-5=3\n", "#3"]])
    [[0.0, 1.0, 1.0]]
    """
    problems = [parse_prompt(last_text(prompt)) for prompt in prompts]
    lines = [[step.strip("\n") for step in steps] for steps in completion_steps]
    return [_line_rewards(*pair) for pair in zip(lines, problems, strict=True)]


def _line_rewards(lines: list[str], problem: Problem) -> list[float]:
    value, moves = problem
    rewards = []
    for i, line in enumerate(lines):
        if i < len(moves):
            right = f"{LETTERS[i]}{value}{moves[i]:+d}={(value + moves[i]) % 10}"
        else:
            right = f"#{value}" if i == len(moves) else None
        rewards.append(float(line == right))
        written = re.search(r"=([0-9])\Z", line)
        value = int(written[1]) if written else value
    return rewards
