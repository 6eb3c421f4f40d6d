"""What the model card of a run says: the method that our options select, its paper, and the options themselves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from .. import __version__


@contextmanager
def describing_options(trainer: Any) -> Iterator[None]:
    """
    Around TRL's `create_model_card`: the card names the method that our options select and its paper, and lists the
    options. With none of them set, the card is TRL's.
    """
    options = _options(trainer.args)
    if not options:
        yield
        return
    for name, value in options.items():
        if isinstance(value, str) and (name, value) in _METHODS:
            trainer._name, trainer._paper = _METHODS[name, value]
    trainer._tag_names = [*type(trainer)._tag_names, "trl-ext"]
    yield
    if trainer.is_world_process_zero():
        path = os.path.join(trainer.args.output_dir, "README.md")
        with open(path, encoding="utf-8") as file:
            before, heading, after = file.read().partition("### Framework versions")
        lines = "".join(f"- `{name}`: `{value}`\n" for name, value in options.items())
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"{before}### Options of trl_ext {__version__}\n\n{lines}\n{heading}{after}")


def _options(args: Any) -> dict[str, Any]:
    """The options of ours that change the training, as they are set."""
    names: dict[str, set[str]] = {"trl": set(), "trl_ext": set()}
    for config in type(args).__mro__:
        if (package := config.__module__.partition(".")[0]) in names:
            names[package] |= {field.name for field in fields(config)}
    ours = names["trl_ext"] - names["trl"] - {"callbacks"}
    return {name: getattr(args, name) for name in sorted(ours) if getattr(args, name) is not None}


def _paper(key: str, title: str, author: str, year: int, arxiv: str | None = None, **source: str) -> dict[str, Any]:
    """In the form of `_paper` of TRL's trainers."""
    entries = {"title": f"{{{title}}}", "author": author, "year": year, **(source or {"eprint": f"arXiv:{arxiv}"})}
    lines = "".join(f"    {name:<7} = {{{value}}},\n" for name, value in entries.items())
    return {"title": title, "id": arxiv, "citation": f"@article{{{key},\n{lines}}}"}


_REINFORCE_PLUS_PLUS = _paper(
    "hu2025reinforce",
    "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
    "Jian Hu and Jason Klein Liu and Haotian Xu and Wei Shen",
    2025,
    "2501.03262",
)
_RLOO = _paper(
    "ahmadian2024back",
    "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
    "Arash Ahmadian and Chris Cremer and Matthias Gallé and Marzieh Fadaee and Julia Kreutzer and Olivier Pietquin "
    "and Ahmet Üstün and Sara Hooker",
    2024,
    "2402.14740",
)
_DR_GRPO = _paper(
    "liu2025understanding",
    "Understanding R1-Zero-Like Training: A Critical Perspective",
    "Zichen Liu and Changyu Chen and Wenjun Li and Penghui Qi and Tianyu Pang and Chao Du and Wee Sun Lee and Min Lin",
    2025,
    "2503.20783",
)
_OPO = _paper(
    "hao2025onpolicy",
    "On-Policy RL with Optimal Reward Baseline",
    "Yaru Hao and Li Dong and Xun Wu and Shaohan Huang and Zewen Chi and Furu Wei",
    2025,
    "2505.23585",
)
_REINFORCE = _paper(
    "williams1992simple",
    "Simple statistical gradient-following algorithms for connectionist reinforcement learning",
    "Ronald J. Williams",
    1992,
    journal="Machine Learning",
    volume="8",
    pages="229--256",
    doi="10.1007/BF00992696",
)
# (option, value) → name and paper in the card. Where no option is listed, they are those of TRL's trainer.
_METHODS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("advantage_estimator", "group_mean"): ("GRPO with mean-only advantages (Dr. GRPO)", _DR_GRPO),
    ("advantage_estimator", "leave_one_out"): ("GRPO with leave-one-out advantages (RLOO)", _RLOO),
    ("advantage_estimator", "length_weighted"): ("GRPO with a length-weighted baseline (OPO)", _OPO),
    ("advantage_estimator", "reinforce"): ("REINFORCE", _REINFORCE),
    ("advantage_estimator", "reinforce_plus_plus"): ("REINFORCE++", _REINFORCE_PLUS_PLUS),
    ("advantage_estimator", "reinforce_plus_plus_baseline"): ("REINFORCE++ with baseline", _REINFORCE_PLUS_PLUS),
}
