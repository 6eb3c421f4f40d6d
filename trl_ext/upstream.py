"""
The parts of TRL that trl_ext depends on beyond its public interface, and quick checks that they are as expected.

`trl-ext env --check` and the contract tests run all of [`CHECKS`]; no model is downloaded and nothing is sent.
"""

import functools
import importlib
import inspect
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

_GRPO, _DPO = "trl.trainer.grpo_trainer.GRPOTrainer", "trl.trainer.dpo_trainer.DPOTrainer"
_KTO = "trl.trainer.kto_trainer.KTOTrainer"
_ENGINE = "trl.experimental.async_grpo"
_ASYNC = f"{_ENGINE}.async_grpo_trainer.AsyncGRPOTrainer"
_REWARD = "trl.trainer.reward_trainer.RewardTrainer"
# Of every trainer that we subclass. Some are of transformers, but TRL may override them in any release.
_OF_EVERY_TRAINER = {
    "train": ("self", "resume_from_checkpoint"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_get_output_dir": ("self", "trial"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "create_model_card": ("self", "model_name", "dataset_name", "tags"),
    "log": ("self", "logs", "start_time"),
}
# What we override, call or replace, with the names of its first parameters.
PARAMETERS: dict[str, tuple[str, ...]] = {
    **{
        f"{cls}.{method}": names
        for cls in (_GRPO, _DPO, _KTO, _REWARD, _ASYNC)
        for method, names in _OF_EVERY_TRAINER.items()
    },
    f"{_GRPO}._prepare_inputs": ("self", "generation_batch"),
    f"{_GRPO}.training_step": ("self", "model", "inputs", "num_items_in_batch"),
    f"{_GRPO}._get_train_sampler": ("self", "dataset"),
    f"{_GRPO}._generate_and_score_completions": ("self", "inputs"),
    f"{_GRPO}._generate": ("self", "prompts"),
    f"{_GRPO}._generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "num_generations"),
    f"{_GRPO}._calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    f"{_GRPO}._get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    ),
    f"{_GRPO}._compute_loss": ("self", "model", "inputs"),
    f"{_GRPO}._log_completion_extra": ("self", "column", "values"),
    f"{_GRPO}.create_scheduler": ("self", "num_training_steps", "optimizer"),
    f"{_GRPO}.save_model": ("self", "output_dir", "_internal_call"),
    f"{_GRPO}._save_optimizer_and_scheduler": ("self", "output_dir"),
    f"{_GRPO}.get_optimizer_cls_and_kwargs": ("args", "model"),
    f"{_DPO}._prepare_inputs": ("self", "inputs"),
    f"{_DPO}.training_step": ("self", "args", "kwargs"),
    f"{_DPO}._prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    f"{_DPO}._set_signature_columns_if_needed": ("self",),
    f"{_DPO}._precompute_ref_logps": ("self", "dataset", "name", "batch_size"),
    f"{_DPO}.compute_ref_log_probs": ("self", "model", "inputs"),
    f"{_DPO}._compute_loss": ("self", "model", "inputs", "return_outputs"),
    f"{_ASYNC}.training_step": ("self", "model", "inputs", "num_items_in_batch"),
    f"{_ASYNC}.get_batch_samples": ("self", "epoch_iterator", "num_batches", "device"),
    f"{_ENGINE}.async_grpo_config.AsyncGRPOConfig.get_process_log_level": ("self",),
    f"{_ENGINE}.async_rollout_worker._AsyncRolloutLoop._score_group": ("self", "group"),
    f"{_ENGINE}.async_rollout_worker._child_main": ("loop_cls", "loop_kwargs"),
    f"{_REWARD}._prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    f"{_REWARD}._set_signature_columns_if_needed": ("self",),
    f"{_REWARD}.evaluation_loop": (
        "self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix",
    ),
    f"{_REWARD}._save": ("self", "output_dir", "state_dict"),
    f"{_REWARD}._get_num_items_in_batch": ("self", "batch_samples", "device"),
    f"{_KTO}.training_step": ("self", "args", "kwargs"),
    f"{_KTO}._prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    f"{_KTO}.compute_ref_log_probs": ("self", "model", "inputs"),
    f"{_KTO}._compute_loss": ("self", "model", "inputs", "return_outputs"),
    "trl.trainer.grpo_config.GRPOConfig.get_process_log_level": ("self",),
    "trl.trainer.dpo_config.DPOConfig.get_process_log_level": ("self",),
    "trl.trainer.kto_config.KTOConfig.get_process_log_level": ("self",),
    "trl.trainer.reward_config.RewardConfig.get_process_log_level": ("self",),
    "trl.trainer.callbacks.SyncRefModelCallback.sync_target_model": ("model", "target_model", "alpha"),
    "trl.trainer.utils.is_async_callable": ("func",),
    "trl.trainer.utils.selective_log_softmax": ("logits", "index"),
    "trl.trainer.utils.use_adapter": ("model", "adapter_name"),
    "trl.trainer.utils.get_config_model_id": ("config",),
    "trl.trainer.utils.maybe_gather_lm_head_ctx": ("params",),
    "trl.trainer.utils.disable_dropout_in_model": ("model",),
    "trl.trainer.utils.create_model_from_path": ("model_id", "architecture", "kwargs"),
    "trl.trainer.utils.global_then_local_main_first": (),
    "trl.trainer.utils.pad": ("tensors", "padding_value", "padding_side", "pad_to_multiple_of"),
    "trl.models.utils.disable_gradient_checkpointing": ("model", "gradient_checkpointing_kwargs"),
    "trl.kernels.chunked_divergence.ChunkedDivergenceFunction.forward": (
        "ctx", "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias",
        "beta", "temperature", "student_logit_scale", "student_final_logit_softcapping", "teacher_logit_scale",
        "teacher_final_logit_softcapping",
    ),
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction.forward": (
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ),
    "trl.trainer.utils.add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "trl.scripts.utils.TrlParser.set_defaults_with_config": ("self", "kwargs"),
    "trl.scripts.utils.TrlParser.parse_args_into_dataclasses": ("self", "args", "return_remaining_strings"),
    "trl.scripts.utils.DatasetConfig": ("path", "name", "data_dir", "data_files", "split"),
    "trl.scripts.env.print_env": (),
    "trl.cli.main.main": ("argv",),
    "trl.cli.commands.get_commands": (),
    "trl.cli.accelerate_config.resolve_accelerate_config_argument": ("launch_args",),
    "trl.cli.accelerate_launcher.launch_training_script": ("script_name", "launch_args", "training_script_args"),
}  # fmt: skip


# Names inside the forward that `add_fused_lm_head` makes.
FUSED_HEAD = ("outputs", "temperature", "logit_scale", "final_logit_softcapping", "cast_lm_head_to_fp32")


class UpstreamChanged(RuntimeError):
    """A part of TRL that trl_ext depends on is not as expected; `what` says in a clause what is different."""

    def __init__(self, what: str):
        import trl

        super().__init__(
            f"TRL {trl.__version__} is not laid out as trl_ext expects: {what}. Install a TRL version that trl_ext "
            "was tested with (see constraints.txt), or report this."
        )


def check_parameters(owner: Any) -> int:
    """
    Compares what `owner`, a class or a module of TRL, holds with the entries of [`PARAMETERS`]. Reads signatures only.

    Returns:
        `int`: Number of entries that belong to `owner`.

    Raises:
        `UpstreamChanged`: If one is missing or takes other parameters.
    """
    prefix = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
    count = 0
    for path, expected in PARAMETERS.items():
        parent, _, attribute = path.rpartition(".")
        if parent != prefix:
            continue
        function = getattr(owner, attribute, None)
        if function is None:
            raise UpstreamChanged(f"{path} is gone")
        found = tuple(inspect.signature(function).parameters)
        if found[: len(expected)] != expected:
            raise UpstreamChanged(f"{path} takes {found}, expected {expected} first")
        count += 1
    return count


def check_overridden(trainer_class: type) -> None:
    """
    Checks the methods of TRL that `trainer_class`, a subclass of one of TRL's trainers, overrides or calls. Called
    when a trainer is made, so that a run with a TRL that has changed ends before it starts.

    Raises:
        `UpstreamChanged`: If one is missing, takes other parameters, or if TRL's trainer is another class.
    """
    theirs = [c for c in trainer_class.__mro__ if c.__module__.partition(".")[0] == "trl"]
    if not sum(map(_checked_once, theirs)):
        names = ", ".join(f"{c.__module__}.{c.__qualname__}" for c in theirs)
        raise UpstreamChanged(f"{trainer_class.__name__} has none of TRL's known trainers among its bases ({names})")


_checked_once = functools.cache(check_parameters)


def _parameters(path: str) -> None:
    parent = path.rpartition(".")[0]
    owner: Any
    try:
        owner = importlib.import_module(parent)
    except ModuleNotFoundError:  # a class
        module, _, name = parent.rpartition(".")
        owner = getattr(importlib.import_module(module), name, None)
    if owner is None:
        raise UpstreamChanged(f"{parent} is gone")
    check_parameters(owner if inspect.ismodule(owner) else trl_class(owner))


def fused_forward(forward: Any) -> Any:
    """TRL's fused forward inside what accelerate, for mixed precision, or we may have put around it."""
    while "fused_lm_head" not in inspect.signature(forward, follow_wrapped=False).parameters:
        inner = getattr(forward, "fused_forward", None) or getattr(forward, "__wrapped__", None)
        if inner is None:
            raise UpstreamChanged("a model's forward has no 'fused_lm_head'")
        forward = inner
    return forward


def fused_head(forward: Any) -> dict[str, Any]:
    """What TRL's fused LM head has read from the model's config and was given: [`FUSED_HEAD`], by name."""
    values = inspect.getclosurevars(fused_forward(forward)).nonlocals
    if missing := [name for name in FUSED_HEAD if name not in values]:
        raise UpstreamChanged(f"add_fused_lm_head has no {missing[0]!r}")
    return {name: values[name] for name in FUSED_HEAD}


def trl_class(found: type) -> Any:
    """TRL's own class, also where ours, a subclass, has been registered in its place."""
    return next(c for c in found.__mro__ if c.__module__.partition(".")[0] == "trl")


def _kl_product() -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    found = inspect.getsource(trl_class(GRPOTrainer)._compute_loss).count("self.beta * per_token_kl")
    if found != 1:
        raise UpstreamChanged(f"GRPOTrainer._compute_loss has {found} products `self.beta * per_token_kl`, expected 1")


def _lazy_names() -> None:
    import trl

    for module in (trl, trl.trainer):
        if not hasattr(type(module), "__getattr__"):
            raise UpstreamChanged(f"{module.__name__} is no lazy module any more")


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


def _tiny_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=4, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, **size))


def _packed_rows() -> None:
    """A packed row needs the fused head's settings, a mask that is left alone, and a keyword for its layout."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from trl.trainer.utils import add_fused_lm_head

    seen, model, name = [], _tiny_model(), "trl_ext_check"

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((tuple(attention_mask.shape), kwargs.get("shared_prefix")))
        return query.transpose(1, 2), None

    add_fused_lm_head(model)
    fused_head(model.forward)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        model.config._attn_implementation = name
        model.base_model(
            input_ids=torch.tensor([[2, 3]]), attention_mask=mask, shared_prefix="layout", use_cache=False
        )
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
    if seen != [((1, 1, 1, 1), "layout")]:
        raise UpstreamChanged("transformers does not hand mask and keywords on to the attention function as they are")


def _tiny_trainer(folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Silent(trl_class(GRPOTrainer)):  # type: ignore[misc]
        def _send_telemetry(self):
            pass

    def rollout(prompts, trainer):
        ids = [[2 + i % 2] * (1 + i) for i in range(len(prompts))]
        return {"prompt_ids": [[2]] * len(prompts), "completion_ids": ids, "logprobs": [[0.0] * len(i) for i in ids]}

    _tiny_model().save_pretrained(folder)  # TRL loads the reference model from its path
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
    "a packed row reaches the attention function, and the fused LM head says how it scores": _packed_rows,
    "GRPO scores a generation batch once and takes the log-probs once per loss": _one_generation_batch,
}
