"""
Held-out accuracy on the clock task, as a function, a trainer callback and a command.

    python -m recipes.clock.accuracy MODEL_DIR [MODEL_DIR ...]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, TrainerCallback

from recipes.clock.task import outcome_reward
from trl_ext.callbacks import curves_available, draw_curves
from trl_ext.trainers.generation import bare_generation_config, undisturbed

TEST_FILE = Path(__file__).parent / "data" / "test.jsonl"


def read_rows(path: str | Path = TEST_FILE) -> list[dict]:
    """The rows of a JSON Lines file; by default the held-out prompts."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def write_completions(model, tokenizer, rows: list[dict], do_sample: bool, seed: int = 0) -> list[str]:
    """
    The model's completion of each row's prompt, all in one batch, at most 64 tokens each.

    Of the model's own generation config nothing is used. It, the random state of the CPU and of the model's device,
    and each module's train or eval mode are afterwards as they were.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            Policy. A wrapper that holds it as `module` is looked through.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        rows (`list[dict]`):
            Rows with a conversational `prompt`.
        do_sample (`bool`):
            Whether to sample from the whole distribution at temperature 1, or to take the likeliest token.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.

    Returns:
        `list[str]`: One completion per row, without special tokens.
    """
    model = getattr(model, "module", model)
    prompts = [row["prompt"] for row in rows]
    texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    generation_config = GenerationConfig(
        max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sampling
    )
    with undisturbed(model, model.device, seed), bare_generation_config(model):
        ids = model.generate(**inputs.to(model.device), generation_config=generation_config)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model, tokenizer, rows: list[dict], do_sample: bool, seed: int = 0) -> float:
    """
    Fraction of `rows` whose completion ends in the right digit. Arguments and side effects (none) as for
    [`write_completions`].
    """
    completions = write_completions(model, tokenizer, rows, do_sample, seed)
    return sum(outcome_reward([row["prompt"] for row in rows], completions)) / len(rows)


class AccuracyReport(TrainerCallback):
    """
    Measure held-out accuracy before and after training and print both, with one prompt and its greedy answers.

    Both are logged, too, as `held_out/greedy` and `held_out/sampled`, and the curves go to `<output_dir>/curves.png`.
    Every process measures, only the first one prints and draws. Training takes the course it would take without the
    callback.
    """

    test_file = TEST_FILE
    next_command = "trl-ext grpo --config recipes/process_grpo_quickstart.yaml"  # a harder task
    trainer = None  # `callback_paths` sets it; without it nothing is logged

    def on_train_begin(self, args, state, control, **kwargs):
        self.rows = read_rows(self.test_file)
        self.before, self.answers = self._measure(**kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        after, answers = self._measure(**kwargs)
        if not state.is_world_process_zero:
            return
        curves = Path(args.output_dir) / "curves.png"
        curves.parent.mkdir(parents=True, exist_ok=True)
        where = f"curves: {curves}"
        if curves_available():
            draw_curves(state.log_history, curves)
        else:
            where = "no curves without matplotlib: pip install matplotlib"
        (greedy_before, before), (greedy, sampled) = self.before, after
        print(
            f"Held-out accuracy, {len(self.rows)} prompts: greedy {greedy_before:.2f} -> {greedy:.2f}, "
            f"sampled {before:.2f} -> {sampled:.2f} ({where})"
        )
        print(f"{self._story(answers)}\nNext, for example: {self.next_command}", flush=True)

    def _story(self, answers: list[str]) -> str:
        """One prompt and its answers before and after: the first that was learned, or the first of all."""
        right = [self._right(before_or_after) for before_or_after in (self.answers, answers)]
        learned = [now > then for then, now in zip(*right, strict=True)]
        index = learned.index(True) if any(learned) else 0
        which = "the first prompt that it has learned to answer" if any(learned) else "the first prompt"
        lines = [f"{which.capitalize()}: {self.rows[index]['prompt'][-1]['content']}"]
        for when, texts, rewards in zip(("before", "after"), (self.answers, answers), right, strict=True):
            said = " ".join(texts[index].split()) or "(nothing)"
            lines.append(f"  {when:<6} {said}  ({'right' if rewards[index] else 'wrong'})")
        return "\n".join(lines)

    def _right(self, completions: list[str]) -> list[float]:
        return outcome_reward([row["prompt"] for row in self.rows], completions)

    def _measure(self, model, processing_class, **kwargs) -> tuple[tuple[float, float], list[str]]:
        """Greedy and sampled accuracy on the held-out prompts, and the greedy answers."""
        greedy, sampled = (
            write_completions(model, processing_class, self.rows, do_sample) for do_sample in (False, True)
        )
        found = sum(self._right(greedy)) / len(self.rows), sum(self._right(sampled)) / len(self.rows)
        if self.trainer is not None:
            # Not the trainer's own `log`, which would flush the averages of the current logging period.
            Trainer.log(self.trainer, dict(zip(("held_out/greedy", "held_out/sampled"), found, strict=True)))
        return found, greedy


class HardAccuracyReport(AccuracyReport):
    """As [`AccuracyReport`], on the held-out prompts of the hard base's data."""

    test_file = Path(__file__).parent / "hard" / "data" / "test.jsonl"
    next_command = "trl-ext ppo --config recipes/ppo_process_quickstart.yaml"  # with a critic of steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out accuracy of models on the clock task.")
    parser.add_argument("model_dirs", nargs="+", metavar="MODEL_DIR", help="folder of a model or of a PEFT adapter")
    rows = read_rows()
    for model_dir in parser.parse_args().model_dirs:
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        greedy, sampled = (accuracy(model, tokenizer, rows, do_sample) for do_sample in (False, True))
        print(f"{model_dir}: greedy {greedy:.2f}, sampled {sampled:.2f} ({len(rows)} held-out prompts)")


if __name__ == "__main__":
    main()
