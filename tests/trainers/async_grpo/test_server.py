"""TRL's own rollout process, requests, queue and weight updates, against the small server of the example."""

import json
import queue
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
from datasets import load_dataset
from peft import LoraConfig
from tiny import logged
from tiny.engine import worker

import recipes.clock
from recipes.clock.on_a_cpu import Weights, serving, tokenizer_of
from recipes.clock.task import outcome_reward, process_reward
from trl_ext.trainers.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

CLOCK = Path(recipes.clock.__file__).parent
MODEL = str(CLOCK / "model")


@pytest.fixture(autouse=True)
def _quick_end(monkeypatch):
    """The rollout process ends when somebody reads what it has written; TRL waits 15 s and then ends it."""
    stop = worker.AsyncRolloutWorker.stop

    def read_and_stop(self):
        self._stop_event_mp.set()
        for _ in range(100):
            if self._process is None or not self._process.is_alive():
                break
            for written in (self.rollout_buffer, self.metrics_queue):
                try:
                    while True:
                        written.get(timeout=0.05)
                except queue.Empty:
                    pass
        stop(self)

    monkeypatch.setattr(worker.AsyncRolloutWorker, "stop", read_and_stop)


def build(url, output_dir, lora=False, reward=outcome_reward, **options):
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    args = AsyncGRPOConfig(
        str(output_dir), vllm_server_base_url=url, num_generations=4, max_completion_length=48, token_budget=-1,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, max_inflight_tasks=16, max_staleness=2,
        bf16=False, use_cpu=True, gradient_checkpointing=False, learning_rate=1e-3, report_to="none",
        **{"max_steps": 3, "save_strategy": "no", "disable_tqdm": True, **options},
    )  # fmt: skip
    return AsyncGRPOTrainer(
        model=MODEL,
        reward_funcs=reward,
        args=args,
        train_dataset=load_dataset("json", data_files=str(CLOCK / "data/train.jsonl"), split="train"),
        processing_class=tokenizer_of(MODEL),
        peft_config=adapter if lora else None,
        weight_transfer=None if lora else Weights(url),
    )


@pytest.mark.slow
def test_an_adapter_learns_with_a_kl_in_the_reward(tmp_path):
    options = {"advantage_estimator": "reinforce_plus_plus", "kl_placement": "reward", "beta": 0.01}
    with serving(MODEL, max_lora_rank=8) as url:
        trainer = build(url, tmp_path, lora=True, **options)
        trainer.train()
        served = requests.get(f"{url}/served", timeout=10).json()
    assert {"trl-policy-v1", "trl-policy-v2"} <= {*served} and MODEL not in served, "TRL sent the adapter alone"
    names = ("ratio", "advantages/mean", "advantages/std", "kl/reference", "kl/effective_beta", "reward")
    for ratio, mean, std, kl, effective, reward in logged(trainer, *names):
        assert ratio == pytest.approx(1.0, abs=0.02), "sampler and trainer agree"
        assert mean == pytest.approx(0.0, abs=1e-5) and std == pytest.approx(1.0, abs=1e-3)
        assert abs(kl) < 0.1 and effective > 0.01 and 0 <= reward <= 1
    assert logged(trainer, "kl/reference")[0][0] == pytest.approx(0.0, abs=1e-4), "the adapter starts at zero"


@pytest.mark.slow
def test_steps_are_rewarded_and_all_weights_are_sent(tmp_path):
    with serving(MODEL) as url:
        trainer = build(url, tmp_path, reward=process_reward, advantage_estimator="process_group_relative")
        trainer.train()
    for values in logged(trainer, "process/steps_mean", "process/step_reward_mean", "advantages/std", "ratio"):
        assert np.isfinite(values).all() and values[0] > 2 and 0.9 < values[3] < 1.1
    assert trainer.model_version == 4, "one update before the first step"


SCRIPT = """
import sys
from datasets import load_dataset
from peft import LoraConfig
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from recipes.clock.on_a_cpu import serving, tokenizer_of, without_gpu
from recipes.clock.task import outcome_reward

def of_the_script(prompts, completions, **kwargs):
    return outcome_reward(prompts, completions)

if __name__ == "__main__":
    model, data, output = sys.argv[1:4]
    without_gpu()
    with serving(model, 8) as url:
        args = AsyncGRPOConfig(
            output, vllm_server_base_url=url, num_generations=4, max_completion_length=48, token_budget=-1,
            per_device_train_batch_size=8, max_inflight_tasks=16, max_staleness=2, bf16=False, use_cpu=True,
            gradient_checkpointing=False, report_to="none", save_strategy="steps", save_steps=1,
            max_steps=int(sys.argv[4]), advantage_estimator="leave_one_out", beta=0.1, kl_target=0.01, kl_horizon=50.0,
        )
        trainer = AsyncGRPOTrainer(
            model=model, reward_funcs=of_the_script, args=args, processing_class=tokenizer_of(model),
            train_dataset=load_dataset("json", data_files=data, split="train"),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        trainer.train(resume_from_checkpoint=sys.argv[4] == "3")
"""


@pytest.mark.slow
def test_a_script_of_trls_runs_with_our_options_and_goes_on(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, "-m", "trl_ext", "script.py", MODEL, str(CLOCK / "data/train.jsonl"), "out"]
    for steps in ("2", "3"):
        done = subprocess.run([*words, steps], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-4000:]
    folders = [tmp_path / f"out/checkpoint-{step}" for step in (1, 2, 3)]
    betas = [json.loads((folder / "trl_ext_state.json").read_text())["beta"] for folder in folders]
    positions = [json.loads((folder / "rollout_state.json").read_text())["prompt_index"] for folder in folders]
    # Rollouts run ahead of the steps, so that two steps may end at one place.
    assert len({*betas}) == 3 and 0 < positions[0] <= positions[1] <= positions[2]
    log = json.loads((folders[-1] / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert log[2]["kl/beta"] == pytest.approx(betas[1]), "the next one, of the checkpoint"
    assert all("rewards/of_the_script" in entry and "advantages/std" in entry for entry in log)
