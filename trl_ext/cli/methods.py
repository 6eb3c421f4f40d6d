"""`trl-ext methods`: every row of our tables, with what it does, its page and its paper. Loads torch, and no TRL."""

import argparse
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from ..functional.advantages import ADVANTAGE_ESTIMATORS
from ..functional.kl import KL_ESTIMATORS
from ..functional.preference import PREFERENCE_LOSSES, UNPAIRED_LOSSES
from ..functional.step_objectives import STEP_OBJECTIVES
from ..papers import PAPERS

EXACT = "The sum over the whole vocabulary, in place of a sample of one token."
_TAKES_A_PATH = {("advantage_estimator", "grpo"), ("kl_estimator", "grpo"), ("loss_type", "dpo")}
_SIGNS = {"Psi": "Ψ", "beta": "β", "alpha": "α", "sigma": "σ", "chi": "χ", "Delta": "Δ", "ell": "ℓ"}


class Method(NamedTuple):
    """A value of an option, and what is known of it."""

    commands: tuple[str, ...]
    option: str
    value: str
    line: str
    page: str
    paper: str  # its link; empty where there is none


def methods() -> Iterator[Method]:
    """All of them, in the order of the tables."""
    for name, row in ADVANTAGE_ESTIMATORS.items():
        page = "process_rewards" if row.steps == "needed" else "ppo" if row.values else "advantages"
        yield _method(("ppo",) if row.values else ("grpo",), "advantage_estimator", name, row, page)
    for name, function in KL_ESTIMATORS.items():
        line = first_line(function)
        yield Method(("grpo", "ppo"), "kl_estimator", name, line, _page("kl"), PAPERS["kl_approx"].url)
    yield Method(("grpo", "ppo"), "kl_estimator", "exact", EXACT, _page("kl"), "")
    for name, loss in PREFERENCE_LOSSES.items():
        yield _method(("dpo",), "loss_type", name, loss, "preference")
    for name, unpaired in UNPAIRED_LOSSES.items():
        yield _method(("kto",), "loss_type", name, unpaired, "preference")
    for name, objective in STEP_OBJECTIVES.items():
        yield _method(("prm",), "objective", name, objective, "reward_models")


def _method(commands: tuple[str, ...], option: str, name: str, row: Any, page: str) -> Method:
    line = first_line(row.loss if option == "objective" else row.function)
    if row.method and row.method not in line:
        line = f"{row.method}. {line}"
    return Method(commands, option, name, line, _page(page), PAPERS[row.paper].url if row.paper else "")


def _page(name: str) -> str:
    return f"docs/methods/{name}.md"


def first_line(function: Callable[..., Any]) -> str:
    """The first sentence of a docstring as plain text, with the arguments that a row has filled in."""
    given: dict[str, Any] = {}
    while isinstance(function, partial):
        given, function = {**function.keywords, **given}, function.func
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    text = re.sub(r"\\([A-Za-z]+)", lambda found: _SIGNS.get(found[1], found[1]), text)
    text = re.sub(r"\\+[(),]|[`*]|\[(?=`)|(?<=`)\]", "", text).replace("^2", "²")
    filled = ", ".join(f"{name}: {value.__name__}" for name, value in given.items())
    return f"{text.rstrip('.')} ({filled})." if filled else text


def as_text(found: list[Method]) -> str:
    """Lines for a terminal: a heading per option and commands, and the values below it."""
    lines: list[str] = []
    width = max(len(method.value) for method in found)
    for method in found:
        of = " and ".join(f"trl-ext {name}" for name in method.commands)
        also = ", or a dotted path" if (method.option, method.commands[0]) in _TAKES_A_PATH else ""
        heading = f"{method.option} of {of}{also}: {method.page}"
        if heading not in lines:
            lines += ["", heading]
        paper = f"  {method.paper}" if method.paper else ""
        lines.append(f"  {method.value:<{width}}  {method.line}{paper}")
    return "\n".join(lines[1:])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trl-ext methods", description=__doc__.partition(": ")[2].capitalize())
    parser.add_argument("word", nargs="?", help="only the methods in whose row this occurs, such as ppo or kl")
    word = parser.parse_args(argv).word
    found = [method for method in methods() if word is None or word.lower() in str(method).lower()]
    if not found:
        raise ValueError(f"no method has {word!r} in its row; `trl-ext methods` lists them all.")
    print(as_text(found))
    return 0
