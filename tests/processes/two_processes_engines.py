"""
Worker of `test_engines.py`: trains cases on one engine and saves what this process saw to `<folder>/<rank>of2.pt`.

    python -m torch.distributed.run --nproc_per_node 2 two_processes_engines.py MODELS FOLDER 2 ENGINE [CASE …]

Without a case it trains all that the engine takes; the word `resumed` trains some once more from a checkpoint.
"""

import os
import shutil
import sys
from pathlib import Path

import engines

if __name__ == "__main__":
    OPTIONS = engines.switch_on(sys.argv[4])

import tiny
import tiny.dpo
import tiny.packed
import tiny.prm
import torch
from launch import leave
from torch.distributed.fsdp import fully_shard
from trl.distributed import DistributedBackend
from two_processes import STEPS, by_step, some_fail
from two_processes_dpo import COLUMNS, REWARDS
from two_processes_edges import UNEVEN, second_half_truncated
from two_processes_packed import nothing_to_save_elsewhere

from trl_ext.functional.preference import PREFERENCE_LOSSES
from trl_ext.sharded import in_parts, whole
from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.kto import KTOConfig, KTOTrainer
from trl_ext.trainers.ppo import PPOConfig, PPOTrainer


def packed_at_first(prompts, trainer):
    """Completions worth packing, and from the second batch on, on the last process, none."""
    later = trainer.state.global_step > 0
    return (nothing_to_save_elsewhere if later else tiny.packed.rollout)(prompts, trainer)


BATCH = 8
GRPO = (tiny.build, GRPOTrainer, GRPOConfig)
PPO = (tiny.build, PPOTrainer, PPOConfig)
DPO = (tiny.dpo.build, DPOTrainer, DPOConfig)
KTO = (tiny.dpo.build, KTOTrainer, KTOConfig)
SAMPLES = {"reward_funcs": some_fail, "rollout_func": tiny.scripted_rollout, "num_iterations": 2, "beta": 0.1}
PACKED = {
    "model": "packed", "shared_prefix": True, "rollout_func": tiny.packed.rollout, "learning_rate": 0.02,
    "reward_funcs": tiny.packed.by_tokens, "train_dataset": tiny.packed.prompts(),
}  # fmt: skip
ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
MOVING = {"ref_refresh_steps": 2, "ref_total_kl": True, "max_steps": 6}
OF_SAMPLES = {
    "REINFORCE++, KL in the reward": {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward"},
    "leave-one-out, k3": {"advantage_estimator": "leave_one_out", "kl_estimator": "k3"},
    "exact": {"kl_estimator": "exact"},
    "exact, accumulated, checkpointing": {"kl_estimator": "exact", **ACCUMULATED},
    "exact, AdamW": {"kl_estimator": "exact", "optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3},
    "the KL of completions": {"kl_placement": "sequence"},
    "k2, adaptive beta": {"kl_estimator": "k2", "kl_target": 0.01, "kl_horizon": 100.0, **ACCUMULATED},
    "a process that has nothing to learn": {
        "kl_estimator": "exact", "mask_truncated_completions": True, "rollout_func": second_half_truncated,
    },
    "uneven, with evaluations": {"kl_estimator": "exact", **UNEVEN},
    "TRL's defaults": {"kl_estimator": "exact", "bf16": True, "gradient_checkpointing": True},
    "steps and outcomes": {**STEPS, "reward_funcs": [by_step, some_fail], "process_weight": 0.5},
    "a process-reward model": {**STEPS, "reward_funcs": None},
    "ReMax": {"advantage_estimator": "remax", "num_generations": 2, "rollout_func": None, "beta": 0.0},
    "sampled": {"advantage_estimator": "leave_one_out", "kl_estimator": "k1", "rollout_func": None},
    "shared prefixes": PACKED,
    "shared prefixes, exact": {**PACKED, "kl_estimator": "exact"},
    "shared prefixes, on one process": {
        **PACKED, "kl_estimator": "exact", "max_completion_length": 32, "rollout_func": packed_at_first,
    },
    "shared prefixes, on no process": {
        **PACKED, "kl_estimator": "exact", "max_completion_length": 32, "rollout_func": nothing_to_save_elsewhere,
    },
    "a reference that is refreshed": {"kl_estimator": "exact", **MOVING},
    "a bound on the KL": {"policy_kl_stop": 1e-4, "optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3},
}  # fmt: skip
# Each with all weights and with LoRA.
CASES = {
    f"{name}, {kind}": (GRPO, {**SAMPLES, **options, "lora": kind == "LoRA"})
    for name, options in OF_SAMPLES.items()
    for kind in ("full", "LoRA")
}
CASES |= {
    "a reference that is synchronised": (
        GRPO, {**SAMPLES, "kl_estimator": "k3", "sync_ref_model": True, "ref_model_sync_steps": 1},
    ),
    "a head that is a unit of its own": (
        GRPO,
        {**SAMPLES, "kl_estimator": "exact", "beta": 1.0, "units": "Linear,Embedding"},
    ),
    "a trained head": (GRPO, {**SAMPLES, "kl_estimator": "k3", "lora": True, "modules_to_save": ["lm_head"]}),
    "shared prefixes, a trained head": (GRPO, {**SAMPLES, **PACKED, "lora": True, "modules_to_save": ["lm_head"]}),
    "PRIME": (
        GRPO,
        {
            **SAMPLES, "advantage_estimator": "prime", "implicit_prm": {"beta": 0.5, "learning_rate": 0.02},
            "lora": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
        },
    ),
    "PPO, full": (PPO, {**SAMPLES, "num_generations": 1}),
    "PPO, LoRA": (PPO, {**SAMPLES, "num_generations": 1, "lora": True, "gradient_checkpointing": True}),
    "PPO, accumulated": (PPO, {**SAMPLES, **ACCUMULATED, "num_generations": 1, "lora": True}),
    "PPO, a critic of its own": (PPO, {**SAMPLES, "num_generations": 1, "lora": True, "value_model": "policy"}),
}  # fmt: skip
MEANS = [name for name, row in PREFERENCE_LOSSES.items() if row.per_token]
OF_PAIRS = {
    "IPO, samples measured": {
        "loss_type": ["psipo_identity"], "callback_paths": "trl_ext.trainers.dpo.samples.PolicySamples",
        **ACCUMULATED,
    },
    "losses of sums": {
        "loss_type": [name for name in PREFERENCE_LOSSES if name not in MEANS], "psi": "logit", "beta": 0.5,
        "preference_prob_column": "p", **REWARDS, "learning_rate": 1e-3,
    },
    "losses of means": {"loss_type": MEANS, "beta": 2.0},
    "pairs, shared prefixes": {"loss_type": ["psipo_identity"], "shared_prefix": True},
    "pairs, a reference that is refreshed": {"loss_type": ["gpo_logistic"], "ref_refresh_steps": 2, "max_steps": 6},
}  # fmt: skip
OF_PAIRS = {name: {"train_dataset": tiny.dpo.pairs(**COLUMNS), **options} for name, options in OF_PAIRS.items()}
CASES |= {f"{name}, {kind}": (DPO, {**o, "kind": kind}) for name, o in OF_PAIRS.items() for kind in ("full", "lora")}
CASES |= {f"BCO, {kind}": (KTO, {"loss_type": "bco", "kind": kind}) for kind in ("full", "lora")}
CASES["pairs, a trained head"] = (
    DPO, {"loss_type": ["gpo_logistic"], "kind": "lora", "modules_to_save": ["lm_head"]},
)  # fmt: skip
CASES |= {f"labels of steps, {kind}": (tiny.prm.build, {"kind": kind}) for kind in tiny.prm.KINDS[:3]}
CASES["labels of steps, LoRA"] = (tiny.prm.build, {"kind": "token_classifier", "weights": "LoRA"})
# DeepSpeed steps inside the backward pass, and leaves no gradients to be taken away; transformers refuses bfloat16 for
# it on a CPU.
WITHOUT_DEEPSPEED = {case for case in CASES if case.startswith(("a bound", "TRL's defaults"))}
KINDS_OF_STATE = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]  # of FSDP2
# Trained again from the checkpoint of their second step.
RESUMED = [
    "k2, adaptive beta, full", "k2, adaptive beta, LoRA", "a reference that is refreshed, full",
    "a reference that is refreshed, LoRA", "a reference that is synchronised", "PRIME", "PPO, full", "PPO, LoRA",
    "losses of sums, full", "BCO, lora",
]  # fmt: skip


def of_engine(engine: str) -> list[str]:
    return [case for case in CASES if not engine.startswith("zero") or case not in WITHOUT_DEEPSPEED]


def gradients() -> dict[str, torch.Tensor]:
    """
    Of a weight in parts, from a loss that is another on each process: of the whole weight as [`whole`] gives it, and
    as `full_tensor` by itself does.
    """
    torch.manual_seed(0)
    linear, scale = torch.nn.Linear(6, 4, bias=False), 1 + torch.distributed.get_rank()
    mine = scale * torch.arange(24.0).view(4, 6)
    fully_shard(linear)
    found = {}
    for name, take in {"ours": whole, "by itself": lambda weight: weight.full_tensor()}.items():
        linear.weight.grad = None
        (take(linear.weight) * mine).sum().backward()
        found[name] = linear.weight.grad.full_tensor()
    return found


def save_models(model: str, folder: Path) -> None:
    """Writes the models of the cases into a folder, before the workers start."""
    shutil.copytree(model, folder / "policy")
    tiny.packed.save(model, folder / "packed")
    for kind in tiny.prm.KINDS[:3]:
        tiny.prm.base(folder / kind, kind)


def build(case: str, of: Path, folder: Path, world_size: int, **options):
    """The trainer of a case; `options` are the engine's."""
    torch.manual_seed(0)  # of an adapter's first weights
    make, settings = CASES[case]
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4, **settings, **options}
    size = settings.pop("per_device_train_batch_size", 4 if make in (DPO, KTO, tiny.prm.build) else BATCH)
    settings["per_device_train_batch_size"] = size // world_size
    if "reward_funcs" in settings and settings["reward_funcs"] is None:
        settings["process_reward_model"] = {"model": str(of / "token_classifier"), "kind": "token_classifier"}
    os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
    if "units" in settings:
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = settings.pop("units")
    if "value_model" in settings:
        settings["value_model"] = str(of / settings["value_model"])
    if make is tiny.prm.build:
        trainer = make(str(of / settings["kind"]), folder, train_dataset=tiny.prm.rows(8), **settings)
    else:
        make, *classes = make
        trainer = make(*classes, str(of / settings.pop("model", "policy")), folder, **settings)
    assert trainer.accelerator.num_processes == world_size
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    """All parameters, whole. Entered by all processes."""
    in_parts(trainer.model)
    named = dict(trainer.model.named_parameters())
    with DistributedBackend(trainer.accelerator).gather_params([*named.values()]):
        return {name: whole(p.detach()).clone() for name, p in named.items()}


def resumed(case: str, of: Path, folder: Path, world_size: int, **options) -> list[dict]:
    """Weights and logs of a run that was not interrupted, and of one that goes on from its second step."""
    folder, found = folder / "".join(filter(str.isalnum, case)), []
    options |= {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    for start in (None, str(folder / "checkpoint-2")):
        trainer = build(case, of, folder, world_size, **options)
        trainer.train(resume_from_checkpoint=start)
        found.append({"weights": weights(trainer), "log": trainer.state.log_history})
    return found


def run(of: Path, folder: Path, world_size: int, cases: list[str], **options) -> dict:
    results = {}
    for case in cases:
        trainer = build(case, of, folder, world_size, **options)
        trainer.train()
        results[case] = {
            "wrapped": type(trainer.model_wrapped).__name__,
            "weights": weights(trainer),
            "log": trainer.state.log_history,
            "counts": getattr(trainer, "shared_prefix_counts", None),
        }
        engines.still_alive()
    return results


def run_and_resume(of: Path, folder: Path, world_size: int, engine: str, **options) -> dict:
    """Under a name for each way of saving, what [`resumed`] gives of each case."""
    results = {}
    for kind in KINDS_OF_STATE if engine == "fsdp2" else KINDS_OF_STATE[:1]:
        os.environ["FSDP_STATE_DICT_TYPE"] = kind
        for case in RESUMED:
            results[case, kind] = resumed(case, of, folder / f"saved{kind}", world_size, **options)
            engines.still_alive()
    return results


if __name__ == "__main__":
    of, folder, world_size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    engine, *cases = sys.argv[4:]
    if cases == ["resumed"]:
        results = run_and_resume(of, folder, world_size, engine, **OPTIONS)
    else:
        results = run(of, folder, world_size, cases or of_engine(engine), **OPTIONS)
    if engine == "fsdp2":
        results["gradients"] = gradients()
    leave(results, folder, world_size)
