"""
Worker of `test_killed.py`. `until` "death": trains to the end, then trains once more, in which the last process is
killed in the middle of a step; else goes on from the last whole checkpoint of that. What this process saw is saved to
`<folder>/<rank>of<world>.pt`.

    python -m torch.distributed.run --nproc_per_node 2 killed_worker.py MODEL FOLDER WORLD_SIZE death|end [fsdp2]
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if "fsdp2" in sys.argv:
    import fsdp2

    fsdp2.switch_on()

from launch import leave
from tiny import build, logged, scripted_rollout

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.ppo.critic import whole

BATCH = 8
OPTIONS = {
    "advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward", "beta": 0.1, "kl_target": 0.01,
    "kl_horizon": 100.0, "rollout_func": scripted_rollout, "max_steps": 7, "save_strategy": "steps", "save_steps": 2,
    "adam_epsilon": 1e-3,  # else a gradient near 0 is divided by its rounding
}  # fmt: skip


class Dies(GRPOTrainer):
    """The last process is killed in the step after the second checkpoint, before its backward."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        accelerator = self.accelerator
        if self.state.global_step == 4 and accelerator.process_index == accelerator.num_processes - 1:
            Path(self.args.output_dir, "died.json").write_text(json.dumps({"time": time.time(), "pid": os.getpid()}))
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def trained(trainer_class, model: str, folder: Path, world_size: int, resume=None, **options) -> dict:
    """With the same rows in each step, whatever the number of processes."""
    rows = {1: 4, 2: 4, 4: 2}[world_size]
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": BATCH // rows // world_size}
    trainer = build(trainer_class, GRPOConfig, model, folder, **{**OPTIONS, **batch, **options})
    assert trainer.accelerator.num_processes == world_size
    trainer.train(resume_from_checkpoint=resume)
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "weights": {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()},
        "beta": trainer.beta,
        "log": logged(trainer),
    }


def run(model: str, folder: Path, world_size: int) -> dict:
    """Nobody is killed: checkpoints of as many processes, for another number."""
    return trained(GRPOTrainer, model, folder / "run", world_size)


if __name__ == "__main__":
    model, folder, world_size, until = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if until == "death":
        whole_run = trained(GRPOTrainer, model, folder / "whole", world_size)
        import torch

        torch.save(whole_run, folder / f"whole-{os.environ['RANK']}.pt")
        trained(Dies, model, folder / "run", world_size)
    leave(trained(GRPOTrainer, model, folder / "run", world_size, resume=True), folder, world_size)
