"""
Worker of `test_launch_files.py`: trains under the settings of a launch file and saves what came of it.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml launched_worker.py MODEL FOLDER WORLD_SIZE [lora]
"""

import os
import sys
from pathlib import Path

if "ACCELERATE_USE_FSDP" in os.environ:
    import fsdp2

    fsdp2.switch_on(**{name: value for name, value in os.environ.items() if name.startswith("FSDP_")})
if "ACCELERATE_USE_DEEPSPEED" in os.environ:
    import engines

    engines.deepspeed_on_cpus()

import torch
from launch import leave
from tiny import build, logged, scripted_rollout
from trl.distributed import DistributedBackend

from trl_ext.sharded import in_parts, whole
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

if __name__ == "__main__":
    model, folder, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)  # of an adapter's first weights
    trainer = build(
        GRPOTrainer, GRPOConfig, model, folder / "out", lora="lora" in sys.argv, rollout_func=scripted_rollout,
        advantage_estimator="reinforce_plus_plus", kl_placement="reward", beta=0.1, optim="sgd", learning_rate=0.1,
        per_device_train_batch_size=8 // world_size, save_strategy="steps", save_steps=2,
        use_cpu="ACCELERATE_USE_DEEPSPEED" not in os.environ,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world_size
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    in_parts(trainer.model)
    named = dict(trainer.model.named_parameters())
    with DistributedBackend(trainer.accelerator).gather_params([*named.values()]):
        saved = {name: whole(p.detach()).clone() for name, p in named.items()}
    results = {
        "wrapped": type(trainer.model_wrapped).__name__,
        "weights": saved,
        "log": logged(trainer),
    }
    if world_size == 1:
        torch.save(results, folder / "0of1.pt")
    else:
        leave(results, folder, world_size)
