"""
The private places of TRL that the package leans on, and quick checks that they are where they were.

`trl-ext env --check` and the contract test run all of [`CHECKS`]; no model is downloaded and nothing is sent.
"""

import importlib
import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

# First parameters of what we override, call or replace.
PARAMETERS = {
    "trl.trainer.grpo_trainer.GRPOTrainer._generate": ("self", "prompts"),
    "trl.trainer.grpo_trainer.GRPOTrainer._calculate_rewards": (
        "self", "inputs", "prompts", "completions", "completion_ids_list",
    ),
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions": ("self", "inputs"),
    "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss": ("self", "model", "inputs"),
    "trl.trainer.grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    ),
    "trl.trainer.dpo_trainer.DPOTrainer._compute_loss": ("self", "model", "inputs"),
    "trl.trainer.dpo_trainer.DPOTrainer.compute_ref_log_probs": ("self", "model", "inputs"),
    "trl.trainer.dpo_trainer.DPOTrainer._set_signature_columns_if_needed": ("self",),
    "trl.trainer.base_trainer._BaseTrainer.create_model_card": ("self", "model_name", "dataset_name", "tags"),
    "trl.scripts.utils.TrlParser.parse_args_into_dataclasses": ("self", "args", "return_remaining_strings"),
    "trl.cli.accelerate_launcher.launch_training_script": ("script_name", "launch_args", "training_script_args"),
}  # fmt: skip


class UpstreamChanged(RuntimeError):
    """A part of TRL that trl_ext depends on is not as expected; `what` is not, in a clause."""

    def __init__(self, what: str):
        import trl

        super().__init__(
            f"TRL {trl.__version__} is not laid out as trl_ext expects: {what}. Install a TRL version that trl_ext "
            "was tested with (see constraints.txt), or report this."
        )


def check_parameters(owner: Any) -> None:
    """Compares the entries of [`PARAMETERS`] that `owner`, a class or a module of TRL, holds. Takes no time."""
    prefix = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
    for path, expected in PARAMETERS.items():
        place, _, attribute = path.rpartition(".")
        if place != prefix:
            continue
        function = getattr(owner, attribute, None)
        if function is None:
            raise UpstreamChanged(f"{path} is gone")
        found = tuple(inspect.signature(function).parameters)
        if found[: len(expected)] != expected:
            raise UpstreamChanged(f"{path} takes {found}, expected {expected} first")


def _parameters(path: str) -> None:
    place = path.rpartition(".")[0]
    owner: Any
    try:
        owner = importlib.import_module(place)
    except ModuleNotFoundError:  # a class
        module, _, name = place.rpartition(".")
        owner = getattr(importlib.import_module(module), name, None)
    if owner is None:
        raise UpstreamChanged(f"{place} is gone")
    check_parameters(owner if inspect.ismodule(owner) else _of_trl(owner))


def _of_trl(trainer: type) -> Any:
    """TRL's own class, also where ours stands in its place."""
    return next(c for c in trainer.__mro__ if c.__module__.partition(".")[0] == "trl")


def _kl_product() -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    found = inspect.getsource(_of_trl(GRPOTrainer)._compute_loss).count("self.beta * per_token_kl")
    if found != 1:
        raise UpstreamChanged(f"GRPOTrainer._compute_loss has {found} products `self.beta * per_token_kl`, expected 1")


def _lazy_names() -> None:
    import trl

    for place in (trl, trl.trainer):
        if not hasattr(type(place), "__getattr__"):
            raise UpstreamChanged(f"{place.__name__} is no lazy module any more")


def _launcher() -> None:
    from trl.cli.commands.training import TrainingCommand

    if "import launch_training_script" not in inspect.getsource(TrainingCommand.run):
        raise UpstreamChanged("TrainingCommand.run does not look up launch_training_script when it is called")


def _one_generation_batch() -> None:
    """Scores scripted completions with a tiny random model and takes the loss."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _tiny_trainer(folder)
        calls: dict[str, list] = {"_calculate_rewards": [], "_get_per_token_logps_and_entropies": []}
        for method, results in calls.items():
            setattr(trainer, method, _recorded(getattr(trainer, method), results))
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        output = trainer._generate_and_score_completions([{"prompt": "a"}] * 4)
        scored = calls["_calculate_rewards"]
        if len(scored) != 1 or scored[0].shape != (4, 1):
            raise UpstreamChanged(
                "_calculate_rewards is not called once per generation batch, with (N, functions) as result"
            )
        shape = output["completion_ids"].shape
        for name in ("completion_mask", "old_per_token_logps", "ref_per_token_logps"):
            if output[name].shape != shape:
                raise UpstreamChanged(
                    f"{name!r} of _generate_and_score_completions is not of the shape of 'completion_ids'"
                )
        if output["advantages"].shape != shape[:1]:
            raise UpstreamChanged("'advantages' of a scored batch is not one number per completion")
        logps = calls["_get_per_token_logps_and_entropies"]
        logps.clear()
        trainer._compute_loss(trainer.model, output)
        if len(logps) != 1 or len(logps[0]) != 3 or logps[0][0].shape != shape:
            raise UpstreamChanged("_compute_loss does not take log-probs, entropies and auxiliary loss from one call")


def _recorded(function: Callable, results: list) -> Callable:
    def recorded(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return recorded


def _tiny_trainer(folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Silent(_of_trl(GRPOTrainer)):  # type: ignore[misc]
        def _send_telemetry(self):
            pass

    def rollout(prompts, trainer):
        ids = [[2 + i % 2] * (1 + i) for i in range(len(prompts))]
        return {"prompt_ids": [[2]] * len(prompts), "completion_ids": ids, "logprobs": [[0.0] * len(i) for i in ids]}

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=4, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, **size)
    Qwen3ForCausalLM(config).save_pretrained(folder)  # TRL loads the reference model from its path
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    return Silent(
        model=folder,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        rollout_func=rollout,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}),
        args=GRPOConfig(
            output_dir=folder, per_device_train_batch_size=4, num_generations=4, num_iterations=2, beta=0.1,
            max_completion_length=8, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        ),
    )  # fmt: skip


CHECKS: dict[str, Callable[[], None]] = {
    "names of trl and trl.trainer are looked up when they are asked for": _lazy_names,
    "training commands start their workers through launch_training_script": _launcher,
    **{f"parameters of {path.removeprefix('trl.')}": partial(_parameters, path) for path in PARAMETERS},
    "GRPO's loss multiplies beta and the KL once": _kl_product,
    "GRPO scores a generation batch once and takes the log-probs once per loss": _one_generation_batch,
}
