"""
Held-out accuracy on the clock task, as a function, a trainer callback and a command.

    python -m recipes.clock.accuracy MODEL_DIR [MODEL_DIR ...]
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

from recipes.clock.task import outcome_reward
from trl_ext.trainers.generation import bare_generation_config

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
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    on_gpu = model.device.type == "cuda"
    try:
        with torch.random.fork_rng([model.device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would also seed the other devices
            if on_gpu:
                with torch.cuda.device(model.device):
                    torch.cuda.manual_seed(seed)
            with bare_generation_config(model):
                ids = model.generate(**inputs.to(model.device), generation_config=generation_config)
    finally:
        for module in in_training:
            module.training = True
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model, tokenizer, rows: list[dict], do_sample: bool, seed: int = 0) -> float:
    """
    Fraction of `rows` whose completion ends in the right digit. Arguments and side effects (none) as for
    [`write_completions`].
    """
    completions = write_completions(model, tokenizer, rows, do_sample, seed)
    return sum(outcome_reward([row["prompt"] for row in rows], completions)) / len(rows)


def draw_curves(log_history: list[dict], path: str | Path, kl: str = "kl") -> None:
    """
    Write a picture of reward, KL to the reference and completion length against the optimiser step.

    Args:
        log_history (`list[dict]`):
            The trainer's `state.log_history`. Drawn are its keys `reward`, `kl` and `completions/mean_length`.
        path (`str` or `Path`):
            File to write; the suffix gives the format.
        kl (`str`, *optional*, defaults to `"kl"`):
            Key of the KL to the reference.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "reward": ("Reward, mean", "reward"),
        kl: ("KL to the reference, nats", "KL"),
        "completions/mean_length": ("Completion length, tokens", "completion length"),
    }
    for axes, (key, (title, noun)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        axes.set(title=title, xlabel="Optimiser step")
        if points:
            axes.plot(*zip(*points, strict=True))
        else:
            axes.text(0.5, 0.5, f"no {noun} logged", ha="center", va="center", transform=axes.transAxes)
    figure.savefig(path, dpi=100)


class AccuracyReport(TrainerCallback):
    """
    Measure held-out accuracy before and after training, print both on one line and draw the training curves.

    The curves go to `<output_dir>/curves.png`. Every process measures, only the first one prints and draws. Training
    takes the course it would take without the callback.
    """

    test_file = TEST_FILE
    kl = "kl"

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = self._measure(**kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        greedy, sampled = self._measure(**kwargs)
        if not state.is_world_process_zero:
            return
        curves = Path(args.output_dir) / "curves.png"
        curves.parent.mkdir(parents=True, exist_ok=True)
        where = f"curves: {curves}"
        if importlib.util.find_spec("matplotlib") is None:
            where = "no curves without matplotlib: pip install matplotlib"
        else:
            draw_curves(state.log_history, curves, self.kl)
        print(
            f"Held-out accuracy, {len(self.rows)} prompts: greedy {self.before[0]:.2f} -> {greedy:.2f}, "
            f"sampled {self.before[1]:.2f} -> {sampled:.2f} ({where})"
        )

    def _measure(self, model, processing_class, **kwargs) -> tuple[float, float]:
        """Greedy and sampled accuracy on the held-out prompts."""
        self.rows = read_rows(self.test_file)
        return tuple(accuracy(model, processing_class, self.rows, do_sample) for do_sample in (False, True))


class HardAccuracyReport(AccuracyReport):
    """As [`AccuracyReport`], on the held-out prompts of the hard base's data."""

    test_file = Path(__file__).parent / "hard" / "data" / "test.jsonl"


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
