"""
Worker of `test_edges.py`: batches that do not come out even, and a process all of whose completions are masked. Saves
what this process saw to `<folder>/<rank>of<world>.pt`.
"""

import warnings
from pathlib import Path

import tiny.dpo as tiny_dpo
import trl
from accelerate import PartialState
from datasets import Dataset
from tiny import PROMPTS, build, scripted_rollout, weights
from two_processes import BATCH, CASES

from trl_ext.trainers.dpo import DPOConfig, DPOTrainer
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer


def second_half_truncated(prompts, trainer):
    """The first half of the rows ends; the second, which is the second of two processes, is cut off."""
    result = scripted_rollout(prompts, trainer)
    result["env_mask"] = [[1] * len(ids) for ids in result["completion_ids"]]
    first = trainer.accelerator.process_index == 0
    ended = len(prompts) if trainer.accelerator.num_processes == 2 and first else BATCH // 2 if first else 0
    for row in range(min(ended, len(prompts))):
        result["completion_ids"][row][-1] = 1  # <eos>
    return result


SEVEN = Dataset.from_dict({"prompt": PROMPTS[:7]})
FIVE = Dataset.from_dict({"prompt": PROMPTS[:5]})
# With two prompts per batch, TRL leaves out the seventh; five prompts do not fill the last batch of the evaluation.
UNEVEN = {
    "train_dataset": SEVEN,
    "eval_dataset": FIVE,
    "num_generations_eval": 2,
    "max_steps": 7,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
UNEVEN_CASES = ["reinforce_plus_plus", "reinforce_plus_plus, KL in the reward", "exact in the loss", "adaptive beta"]
UNEVEN_CASES += ["leave_one_out", "step rewards"]
GRPO = {f"truncated: {name}": {"max_steps": 2, "mask_truncated_completions": True, **CASES[name]} for name in CASES}
GRPO |= {f"uneven: {name}": {**UNEVEN, **CASES[name]} for name in UNEVEN_CASES}
LOSSES = {"TRL": (trl.DPOTrainer, trl.DPOConfig, "sigmoid"), "ours": (DPOTrainer, DPOConfig, "gpo_logistic")}
DPO = {f"uneven pairs: {rows}, {who}": (rows, *LOSSES[who]) for rows in (13, 14, 15) for who in LOSSES}
DPO["uneven pairs: 15, β-DPO"] = (15, DPOTrainer, DPOConfig, "beta_dpo")


def ones(completions, **kwargs):
    return [1.0] * len(completions)


def of_process(completions, **kwargs):
    return [float(PartialState().process_index)] * len(completions)


NOTHING_LEARNED = {"ones": ones, "of_process": of_process}


def of_completion(completion_ids, **kwargs):
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


def run(model: str, folder: Path, world_size: int) -> dict:
    results = {}
    options = {"optim": "sgd", "learning_rate": 0.1}
    for name, case in GRPO.items():
        batch = BATCH // world_size
        truncated = name.startswith("truncated")
        trainer = build(
            GRPOTrainer,
            GRPOConfig,
            model,
            folder,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            rollout_func=second_half_truncated if truncated else scripted_rollout,
            **{"reward_funcs": of_completion, **options, **case},
        )
        results[name] = finished(trainer, world_size)
    for name, (rows, trainer_class, config_class, loss) in DPO.items():
        trainer = tiny_dpo.build(
            trainer_class,
            config_class,
            model,
            folder,
            kind="reference",
            train_dataset=tiny_dpo.pairs(rows),
            eval_dataset=tiny_dpo.pairs(rows - 8),
            per_device_train_batch_size=4 // world_size,
            per_device_eval_batch_size=4 // world_size,
            eval_strategy="epoch",
            loss_type=[loss],
            **{**options, "max_steps": 6},
        )
        results[name] = finished(trainer, world_size)
    for name, reward in NOTHING_LEARNED.items():
        trainer = build(
            GRPOTrainer, GRPOConfig, model, folder, rollout_func=scripted_rollout, reward_funcs=reward, max_steps=10,
            advantage_estimator="group_mean", per_device_train_batch_size=32 // world_size,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        results[name] = [text for w in caught if "first 10 steps" in (text := str(w.message))]
    return results


def finished(trainer, world_size: int) -> dict:
    assert trainer.accelerator.num_processes == world_size
    trainer.train()
    return {"weights": weights(trainer), "log": trainer.state.log_history}
