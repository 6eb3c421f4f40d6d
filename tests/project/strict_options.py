"""YAML options read as the command line reads them: a key that the command does not know is an error."""

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.grpo import GRPOScriptArguments

from recipes.async_grpo import RunArguments
from trl_ext.labels import LabelStepsConfig
from trl_ext.lookup import import_path
from trl_ext.rejection_sampling import RejectionSamplingConfig
from trl_ext.trainers.async_grpo import AsyncGRPOConfig
from trl_ext.trainers.dpo import DPOConfig
from trl_ext.trainers.grpo import GRPOConfig
from trl_ext.trainers.kto import KTOConfig
from trl_ext.trainers.ppo import PPOConfig
from trl_ext.trainers.prm import PRMConfig

KINDS = {
    "grpo": (GRPOScriptArguments, GRPOConfig),
    "dpo": (ScriptArguments, DPOConfig),
    "kto": (ScriptArguments, KTOConfig),
    "ppo": (GRPOScriptArguments, PPOConfig),
    "sft": (ScriptArguments, SFTConfig),
    "async": (RunArguments, AsyncGRPOConfig),
    "prm": (ScriptArguments, PRMConfig),
}
WITHOUT_TRAINER = {"label-steps": LabelStepsConfig, "rejection-sampling": RejectionSamplingConfig}
ON_THIS_MACHINE = {"bf16": False, "use_cpu": True}


def read_options(command, options):
    """The config that `trl-ext <command>`, or the script for `async`, makes of them, its reward functions imported."""
    if command in WITHOUT_TRAINER:  # its options are all there is
        parser = TrlParser((WITHOUT_TRAINER[command],))
        assert parser.set_defaults_with_config(**options) == []
        return parser.parse_args_into_dataclasses(args=[])[0]
    script_arguments, config_class = KINDS[command]
    also = () if command == "async" else (ModelConfig, DatasetMixtureConfig)
    parser = TrlParser((script_arguments, config_class, *also))
    assert parser.set_defaults_with_config(**options | ON_THIS_MACHINE) == []
    script_args, config, *_ = parser.parse_args_into_dataclasses(args=[])
    for reward in getattr(script_args, "reward_funcs", None) or []:
        import_path(reward)
    return config
