"""
Choose among sampled answers with a process-reward model, and search with it step by step, on the hard clock task.

    python -m recipes.clock.search PRM_DIR [PRM_DIR ...] [--seed 0] [--output outputs/search]

Measures, on the held-out prompts, one sample, the majority and the weighted vote, the best of n by each aggregate of
the step scores, and a beam search over steps that samples as much; and two ceilings of a choice: the share of prompts
with any right sample, and with any whose every line is right. Of the hard base's right results most are luck, since
there are ten digits, and a judge of steps does not choose them. Prints a table, writes the numbers to
`OUTPUT/search.json` and draws `OUTPUT/search.png`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.clock.accuracy import HardAccuracyReport, read_rows
from recipes.clock.task import outcome_reward, process_reward, written_result
from trl_ext.functional import aggregate, best_of_n, majority_vote, weighted_vote
from trl_ext.labels.sampling import Sampler, TransformersSampler
from trl_ext.rewards import ProcessRewardModel
from trl_ext.trainers.grpo.separators import decode
from trl_ext.trainers.grpo.steps import StepCuts

HERE = Path(__file__).parent
AGGREGATES = ("min", "prod", "last", "mean")
SEPARATOR = "\n"  # of steps
LONGEST = 64  # tokens of an answer
BATCH_SIZE = 1024
Judge = Callable[[list, list[list[str]]], list[list[float | None]]]  # a `ProcessRewardModel`: (prompts, steps)


def tokens_with(tokenizer: Any, separator: str) -> list[int]:
    """Tokens in whose text a separator of one character occurs, and after which a step is over."""
    if len(separator) != 1:
        raise ValueError(
            f"separator must be one character, since longer ones may be spread over tokens, got {separator!r}."
        )
    return [i for i in range(len(tokenizer)) if separator in decode(tokenizer, [i])]


class Beam(NamedTuple):
    """The beginning of an answer: its tokens as they were sampled, its score, and whether nothing can follow."""

    ids: tuple[int, ...] = ()
    score: float = 0.0
    finished: bool = False


def beam_search(
    prompts: list[list[int]],
    sample_step: Sampler,
    score: Callable[[list[int], list[tuple[int, ...]]], list[float]],
    eos_token_id: int,
    beams: int = 4,
    expansions: int = 4,
    longest: int = LONGEST,
) -> list[list[Beam]]:
    """
    Beam search over steps with a process-reward model (Snell et al., 2024, §5.2,
    https://huggingface.co/papers/2408.03314, where N is `beams · expansions` and M is `expansions`).

    Each round samples `expansions` next steps of every beam (of the prompt itself `beams · expansions` first ones),
    scores them as parts of their answer, and keeps the best `beams` to a prompt. Finished answers keep their score and
    their place as long as they are among the best. The search of a prompt is over when all that it keeps is finished.
    The rounds of all prompts run together.

    A step that is sampled twice is scored once and kept twice, so that the best beginning is given more samples of
    what comes next; those of its worse siblings would be wasted.

    Args:
        prompts (`list[list[int]]`):
            Token ids of the prompts.
        sample_step ([`Sampler`]):
            `(prefixes, n, budgets)` to `n[i]` next steps of prefix `i`, as tokens.
        score (`Callable`):
            `(prompt, ids)`, the place of the prompt of each beginning and its tokens, to scores; larger is better, and
            NaN is worse than any.
        eos_token_id (`int`):
            Token that ends an answer.
        beams (`int`, *optional*, defaults to `4`):
            Beginnings that are kept of each prompt.
        expansions (`int`, *optional*, defaults to `4`):
            Steps that are tried after each.
        longest (`int`, *optional*, defaults to `64`):
            Tokens that an answer may have.

    Returns:
        `list[list[Beam]]`: Finished answers to each prompt, the best first.

    Raises:
        `ValueError`: If `beams`, `expansions` or `longest` is below 1.
    """
    if min(beams, expansions, longest) < 1:
        raise ValueError(f"beams, expansions and longest must be at least 1, got {beams}, {expansions}, {longest}.")
    kept = [[Beam()] for _ in prompts]
    first = True
    while open_beams := [(i, beam) for i, pool in enumerate(kept) for beam in pool if not beam.finished]:
        steps = sample_step(
            [[*prompts[i], *beam.ids] for i, beam in open_beams],
            [beams * expansions if first else expansions] * len(open_beams),
            [longest - len(beam.ids) for _, beam in open_beams],
        )
        grown = [(i, (*b.ids, *step)) for (i, b), of_b in zip(open_beams, steps, strict=True) for step in of_b]
        distinct = [*dict.fromkeys(grown)]
        scores = dict(zip(distinct, score([i for i, _ in distinct], [ids for _, ids in distinct]), strict=True))
        pools = [[beam for beam in pool if beam.finished] for pool in kept]
        for i, ids in grown:
            pools[i].append(Beam(ids, scores[i, ids], ids[-1] == eos_token_id or len(ids) >= longest))
        kept = [sorted(pool, key=_worst_last)[:beams] for pool in pools]
        first = False
    return kept


def _worst_last(beam: Beam) -> tuple[bool, float]:
    return beam.score != beam.score, -beam.score


class Selection:
    """
    The held-out prompts, sampled answers to them, and what a process-reward model makes of them.

    Args:
        policy (`str` or `Path`):
            Folder of the model that answers.
        rows (`list[dict]`):
            Rows with a conversational `prompt`.
    """

    def __init__(self, policy: str | Path, rows: list[dict]):
        self.tokenizer = AutoTokenizer.from_pretrained(policy)
        self.model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        self.prompts = [row["prompt"] for row in rows]
        template = self.tokenizer.apply_chat_template
        self.prompt_ids = [
            template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"] for prompt in self.prompts
        ]

    def answers(self, num_generations: int) -> list[tuple[int, ...]]:
        """Sampled answers, those to one prompt side by side."""
        number = len(self.prompts)
        groups = self.sampler()(self.prompt_ids, [num_generations] * number, [LONGEST] * number)
        return [tuple(ids) for group in groups for ids in group]

    def sampler(self, end_tokens: Sequence[int] = ()) -> TransformersSampler:
        """Samples the policy until an answer ends, or until one of these tokens."""
        return TransformersSampler(self.model, [self.tokenizer.eos_token_id, *end_tokens], BATCH_SIZE)

    def texts(self, answers: list[tuple[int, ...]]) -> list[str]:
        """Texts of token ids."""
        return [decode(self.tokenizer, [*ids], skip_special_tokens=True) for ids in answers]

    def right(self, places: list[int], answers: list[tuple[int, ...]]) -> list[float]:
        """1.0 for each right answer to the prompt at its place."""
        return outcome_reward([self.prompts[i] for i in places], self.texts(answers))

    def step_scores(self, judge: Judge, places: list[int], answers: list[tuple[int, ...]]) -> list[list]:
        """Scores of the steps of each answer."""
        cuts = StepCuts([*map(list, answers)], None, self.tokenizer, SEPARATOR)
        return judge([self.prompts[i] for i in places], cuts.texts)

    def search(self, judge: Judge, how: str, beams: int, expansions: int) -> dict[str, float]:
        """Accuracy of the best answers of a beam search, and the tokens that it samples per prompt."""
        sample_step = self.sampler(tokens_with(self.tokenizer, SEPARATOR))

        def score(places: list[int], answers: list[tuple[int, ...]]) -> list[float]:
            return [aggregate(scores, how) for scores in self.step_scores(judge, places, answers)]

        eos = self.tokenizer.eos_token_id
        found = beam_search(self.prompt_ids, sample_step, score, eos, beams, expansions)
        right = self.right([*range(len(found))], [pool[0].ids for pool in found])
        return {"accuracy": sum(right) / len(right), "tokens": sample_step.tokens / len(right)}


def program(prompts: list, steps: list[list[str]]) -> list[list[float]]:
    """A judge that makes no mistake."""
    return process_reward(prompts, [None] * len(prompts), steps)


def choices(
    texts: list[str], right: list[float], clean: list[bool], step_scores: list[list], size: int
) -> dict[str, float]:
    """
    Accuracy of each way to choose among `size` answers to a prompt, over all disjoint groups of so many.

    Args:
        texts, right, clean, step_scores:
            Of the answers, `clean` being the right ones without a wrong step; the answers to one prompt side by
            side, a multiple of `size`.
        size (`int`):
            Answers to choose from.

    Returns:
        `dict[str, float]`: Shares of groups from which a right answer is chosen; `"any"` where there is one, and
        `"any clean"` where there is one without a wrong step.
    """
    groups = [slice(start, start + size) for start in range(0, len(texts), size)]
    results = [*map(written_result, texts)]

    def voted(vote: Callable[[slice], str | None]) -> float:
        # All answers to a prompt with the same result are right, or none is.
        winners = [(group, vote(group)) for group in groups]
        hits = [right[g][results[g].index(winner)] for g, winner in winners if winner is not None]
        return sum(hits) / len(groups)

    share: dict[str, float] = {"one": sum(right) / len(right), "majority": voted(lambda g: majority_vote(results[g]))}
    for how in AGGREGATES:
        scores = [aggregate(of_steps, how) for of_steps in step_scores]
        share[f"weighted, {how}"] = voted(lambda g, s=scores: weighted_vote(results[g], s[g]))
        best = zip(groups, best_of_n(scores, size), strict=True)
        share[f"best, {how}"] = sum(right[g][place] for g, place in best if place is not None) / len(groups)
    share["any clean"] = sum(any(clean[g]) for g in groups) / len(groups)
    share["any"] = sum(max(right[g]) for g in groups) / len(groups)
    return share


def measure(selection: Selection, judge: Judge, answers: list[tuple[int, ...]], how: str, seed: int) -> dict:
    """All figures of one judge: `{"choices": {size: {way: accuracy}}, "beam": {size: {…}}, "tokens": per prompt}`."""
    each = len(answers) // len(selection.prompts)
    places = [i for i in range(len(selection.prompts)) for _ in range(each)]
    right, scores = selection.right(places, answers), selection.step_scores(judge, places, answers)
    judged = selection.step_scores(program, places, answers)
    clean = [is_right == 1.0 and all(steps) for is_right, steps in zip(right, judged, strict=True)]
    material = selection.texts(answers), right, clean, scores
    sizes = [2**e for e in range(each.bit_length()) if each % 2**e == 0]
    widths = {size: int(size**0.5) for size in sizes if int(size**0.5) ** 2 == size and size > 1}
    torch.manual_seed(seed)
    return {
        "tokens": sum(map(len, answers)) / len(selection.prompts),
        "choices": {size: choices(*material, size) for size in sizes},
        "beam": {size: selection.search(judge, how, width, width) for size, width in widths.items()},
    }


def table(results: dict[str, dict]) -> list[str]:
    """Rows of a Markdown table: a line per way to choose, a column per process-reward model."""
    lines = [" | ".join(["| way", *results]) + " |", "|---" * (len(results) + 1) + "|"]
    first = next(iter(results.values()))
    size = max(first["choices"])
    for way in first["choices"][size]:
        cells = [f"{result['choices'][size][way]:.3f}" for result in results.values()]
        lines.append(" | ".join([f"| {way} of {size}" if way != "one" else "| one sample", *cells]) + " |")
    for size in first["beam"]:
        width = int(size**0.5)
        cells = [f"{result['beam'][size]['accuracy']:.3f}" for result in results.values()]
        lines.append(" | ".join([f"| beam {width} × {width}", *cells]) + " |")
    return lines


def draw(results: dict[str, dict], path: Path) -> None:
    """Mean accuracy over the process-reward models against the number of samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    runs = [*results.values()]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    ways = {"any": ("0.7", "any right (ceiling)"), "best, prod": ("C0", "best by product")}
    ways |= {
        "best, mean": ("C4", "best by mean"),
        "weighted, prod": ("C2", "weighted vote"),
        "majority": ("C3", "majority"),
    }
    for way, (color, label) in ways.items():
        points = [(size, mean([run["choices"][size][way] for run in runs])) for size in runs[0]["choices"]]
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker=".")
    if runs[0]["beam"]:
        points = [(size, mean([run["beam"][size]["accuracy"] for run in runs])) for size in runs[0]["beam"]]
        axes.plot(*zip(*points, strict=True), color="k", marker="D", linestyle=":", label="beam search")
    axes.set(xlabel="Samples per prompt (beams × expansions)", ylabel="Held-out accuracy", ylim=(0, 1))
    axes.set_xscale("log", base=2)
    axes.set_xticks([*runs[0]["choices"]], labels=map(str, runs[0]["choices"]))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Select and search with a process-reward model on the clock task.")
    parser.add_argument("prm_dirs", nargs="+", metavar="PRM_DIR", help="folder of a process-reward model")
    parser.add_argument("--kind", help="its kind, where the folder does not say it; see ProcessRewardModel")
    parser.add_argument("--policy", default=HERE / "hard" / "model", help="folder of the model that answers")
    parser.add_argument("--num_generations", type=int, default=16, help="answers to a prompt, a power of 2")
    parser.add_argument("--how", choices=AGGREGATES, default="prod", help="aggregate of the beam search")
    parser.add_argument("--limit", type=int, help="use the first held-out prompts only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--output", type=Path, default=Path("outputs/search"), help="folder of numbers and picture")
    args = parser.parse_args()
    if args.num_generations < 1:
        parser.error(f"--num_generations must be positive, got {args.num_generations}.")
    torch.set_num_threads(1)  # the models are too small to gain by more
    selection = Selection(args.policy, read_rows(HardAccuracyReport.test_file)[: args.limit])
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    answers = selection.answers(args.num_generations)
    results = {}
    for folder in args.prm_dirs:
        start = time.process_time()
        prm = ProcessRewardModel(folder, batch_size=256, **({"kind": args.kind} if args.kind else {}))
        results[folder] = measure(selection, prm, answers, args.how, args.seed)
        (args.output / "search.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"{folder}: {time.process_time() - start:.0f} CPU s", flush=True)
    print(*table(results), sep="\n")
    draw(results, args.output / "search.png")


if __name__ == "__main__":
    main()
