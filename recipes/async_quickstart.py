"""
Asynchronous GRPO on the embedded example, on a CPU: a small server in place of vLLM, in a process of its own.

    python -m trl_ext recipes/async_quickstart.py --config recipes/async_quickstart.yaml
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a script's own folder is searched, not the one it is started in

from recipes import async_grpo
from recipes.clock.on_a_cpu import Weights, serving, tokenizer_of, without_gpu


def main() -> None:
    run, config = async_grpo.parse()
    without_gpu()
    # With an adapter TRL sends that alone, which needs no transfer of weights.
    with serving(run.model_name_or_path, run.lora_r if run.use_peft else None, config.seed) as url:
        config.vllm_server_base_url = url
        transfer = {} if run.use_peft else {"weight_transfer": Weights(url)}
        async_grpo.train(run, config, processing_class=tokenizer_of(run.model_name_or_path), **transfer)


if __name__ == "__main__":  # the rollout process imports this file again
    main()
