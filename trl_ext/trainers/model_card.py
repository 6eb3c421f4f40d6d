"""What the model card of a run says: the method that our options select, its paper, and the options themselves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from .. import __version__
from ..functional.preference_losses import MARGIN_LOSSES


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
    for name, value in reversed(options.items()):
        for entry in reversed(_entries(value)):  # of several losses, the first gives its name
            if (name, entry) in _METHODS:
                trainer._name, trainer._paper = _METHODS[name, entry]
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
    defaults: dict[str, dict[str, Any]] = {"trl": {}, "trl_ext": {}}
    for config in type(args).__mro__:
        if (package := config.__module__.partition(".")[0]) in defaults:
            defaults[package] |= {field.name: field.default for field in fields(config)}
    ours = defaults["trl_ext"].keys() - defaults["trl"].keys() - {"callbacks"}
    changed = {name for name in ours if getattr(args, name) != defaults["trl_ext"][name]}
    if any(("loss_type", entry) in _METHODS for entry in _entries(args.loss_type)):
        changed.add("loss_type")  # a field of TRL's that holds names of ours
    return {name: getattr(args, name) for name in sorted(changed)}


def _entries(value: Any) -> list[str]:
    """The names in an option: itself, or those of a list."""
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]


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
_DEEPSEEKMATH = _paper(
    "shao2024deepseekmath",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li and "
    "Y. Wu and Daya Guo",
    2024,
    "2402.03300",
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
_PSIPO = _paper(
    "azar2023general",
    "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    "Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and Daniele Calandriello and "
    "Michal Valko and Rémi Munos",
    2023,
    "2310.12036",
)
_GPO = _paper(
    "tang2024generalized",
    "Generalized Preference Optimization: A Unified Approach to Offline Alignment",
    "Yunhao Tang and Zhaohan Daniel Guo and Zeyu Zheng and Daniele Calandriello and Rémi Munos and Mark Rowland and "
    "Pierre Harvey Richemond and Michal Valko and Bernardo Ávila Pires and Bilal Piot",
    2024,
    "2402.05749",
)
_RPO = _paper(
    "sun2025rewardaware",
    "Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment",
    "Shengyang Sun and others",
    2025,
    "2502.00203",
)
_ODPO = _paper(
    "amini2024direct",
    "Direct Preference Optimization with an Offset",
    "Afra Amini and Tim Vieira and Ryan Cotterell",
    2024,
    "2402.10571",
)
_DPOP = _paper(
    "pal2024smaug",
    "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    "Arka Pal and Deep Karkhanis and Samuel Dooley and Manley Roberts and Siddartha Naidu and Colin White",
    2024,
    "2402.13228",
)
_LENGTH_DPO = _paper(
    "park2024disentangling",
    "Disentangling Length from Quality in Direct Preference Optimization",
    "Ryan Park and Rafael Rafailov and Stefano Ermon and Chelsea Finn",
    2024,
    "2403.19159",
)
_SIMPO = _paper(
    "meng2024simpo",
    "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    "Yu Meng and Mengzhou Xia and Danqi Chen",
    2024,
    "2405.14734",
)
_SPPO = _paper(
    "wu2024selfplay",
    "Self-Play Preference Optimization for Language Model Alignment",
    "Yue Wu and Zhiqing Sun and Huizhuo Yuan and Kaixuan Ji and Yiming Yang and Quanquan Gu",
    2024,
    "2405.00675",
)
_CHIPO = _paper(
    "huang2024correcting",
    "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via Chi-Squared Preference "
    "Optimization",
    "Audrey Huang and Wenhao Zhan and Tengyang Xie and Jason D. Lee and Wen Sun and Akshay Krishnamurthy and Dylan J. "
    "Foster",
    2024,
    "2407.13399",
)
_CAL_DPO = _paper(
    "xiao2024caldpo",
    "Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment",
    "Teng Xiao and Yige Yuan and Huaisheng Zhu and Mingxiao Li and Vasant G. Honavar",
    2024,
    "2412.14516",
)
_BETA_DPO = _paper(
    "wu2024betadpo",
    "β-DPO: Direct Preference Optimization with Dynamic β",
    "Junkang Wu and Yuexiang Xie and Zhengyi Yang and Jiancan Wu and Jinyang Gao and Bolin Ding and Xiang Wang and "
    "Xiangnan He",
    2024,
    "2407.08639",
)
# (option, value) → name and paper in the card. Where no option is listed, they are those of TRL's trainer.
_METHODS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("advantage_estimator", "group_mean"): ("GRPO with mean-only advantages (Dr. GRPO)", _DR_GRPO),
    ("advantage_estimator", "leave_one_out"): ("GRPO with leave-one-out advantages (RLOO)", _RLOO),
    ("advantage_estimator", "length_weighted"): ("GRPO with a length-weighted baseline (OPO)", _OPO),
    ("advantage_estimator", "reinforce"): ("REINFORCE", _REINFORCE),
    ("advantage_estimator", "reinforce_plus_plus"): ("REINFORCE++", _REINFORCE_PLUS_PLUS),
    ("advantage_estimator", "reinforce_plus_plus_baseline"): ("REINFORCE++ with baseline", _REINFORCE_PLUS_PLUS),
    ("advantage_estimator", "process_group_relative"): ("GRPO with process rewards", _DEEPSEEKMATH),
    **{("loss_type", f"psipo{psi}"): ("ΨPO", _PSIPO) for psi in ("", "_logit")},
    ("loss_type", "psipo_identity"): ("IPO", _PSIPO),
    **{("loss_type", f"gpo_{name}"): ("GPO", _GPO) for name in MARGIN_LOSSES},
    **{("loss_type", name): ("RPO", _RPO) for name in ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")},
    ("loss_type", "odpo"): ("ODPO", _ODPO),
    ("loss_type", "dpop"): ("DPO-Positive", _DPOP),
    ("loss_type", "length_dpo"): ("R-DPO", _LENGTH_DPO),
    ("loss_type", "simpo"): ("SimPO", _SIMPO),
    ("loss_type", "sppo"): ("SPPO", _SPPO),
    ("loss_type", "chipo"): ("χPO", _CHIPO),
    ("loss_type", "cal_dpo"): ("Cal-DPO", _CAL_DPO),
    ("loss_type", "beta_dpo"): ("β-DPO", _BETA_DPO),
}
