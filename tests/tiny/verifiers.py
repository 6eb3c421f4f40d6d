"""Verifiers of answers of the tiny model, and ends of their steps, at dotted paths."""

import os
import time


def has_digit(completions, **kwargs) -> list[float]:
    """Right is what holds a digit."""
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return [float(any(c.isdigit() for c in text)) for text in completions]


def equals_answer(prompts, completions, completion_ids, answer, log_extra, log_metric, trainer_state):
    """All that TRL gives, by name; `None` where the answer is not known."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
    log_extra("answer", answer)
    log_metric("known", 1.0)
    assert trainer_state.global_step == 0
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [None if a is None else float(text == a) for text, a in zip(texts, answer, strict=True)]


async def later(completions, **kwargs):
    return has_digit(completions)


def steps(completions, **kwargs):
    return [[1.0, 0.0] for _ in completions]


def too_few(completions, **kwargs):
    return [1.0]


def every_token(token_ids, tokenizer):
    return [*range(len(token_ids))]
