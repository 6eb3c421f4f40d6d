"""
TRL's asynchronous GRPO from a YAML file, for which TRL has no command. With our options under `python -m trl_ext`:

    python -m trl_ext recipes/async_grpo.py --config recipes/async_grpo.yaml
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import load_dataset
from trl import TrlParser
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from trl_ext.lookup import import_path


@dataclass
class RunArguments:
    """What is trained, on what; TRL's `ModelConfig` has an option of the same name as the trainer's config."""

    model_name_or_path: str = field(metadata={"help": "Model id or folder, as the server has it."})
    dataset_name: str = field(metadata={"help": "Data set id or folder."})
    reward_funcs: list[str] = field(metadata={"help": "Dotted paths of reward functions."})
    dataset_config: str | None = field(default=None, metadata={"help": "Name of a configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Its rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Its alpha."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Its modules."})

    def peft_config(self) -> Any:
        """The adapter to train, if one is asked for."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        modules = self.lora_target_modules or "all-linear"
        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, target_modules=modules, task_type="CAUSAL_LM")


def parse(args: list[str] | None = None) -> tuple[RunArguments, Any]:
    """What a command line, and its YAML file, asks for; unknown options are refused."""
    return TrlParser((RunArguments, AsyncGRPOConfig)).parse_args_and_config(args)


def train(run: RunArguments, config: Any, **arguments: Any) -> Any:
    """Trains; `arguments` are further ones of the trainer."""
    trainer = AsyncGRPOTrainer(
        model=run.model_name_or_path,
        reward_funcs=[import_path(path, "reward_funcs") for path in run.reward_funcs],
        args=config,
        train_dataset=load_dataset(run.dataset_name, run.dataset_config, split=run.dataset_train_split),
        peft_config=run.peft_config(),
        **arguments,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    return trainer


if __name__ == "__main__":  # the rollout process imports this file again
    train(*parse())
