"""TRL's asynchronous engine with given conversations in place of sampled ones: no server, no other process."""

import asyncio
import functools
import multiprocessing
import queue

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.async_grpo import async_rollout_worker as worker
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
from trl.experimental.async_grpo.packing import TreeRow

from recipes.clock.on_a_cpu import RESPONSE_TEMPLATE, without_gpu

PartialState(cpu=True)  # TRL's logger asks for it
without_gpu()

G = 4
LINE_END = 3  # the token of "b", which ends a step


def outcome(completions, **kwargs):
    """What the conversation was given."""
    return [completion[-1]["reward"] for completion in completions]


def lengths(completions, completion_steps, **kwargs):
    """Rewards of steps: their tokens, which the tokenizer writes with spaces; none for the second of a completion."""
    sizes = [[float(len(step.split())) for step in steps] for steps in completion_steps]
    return [[None if j == 1 else size for j, size in enumerate(row)] for row in sizes]


def tokenizer_of(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = RESPONSE_TEMPLATE  # not used, but TRL knows no other for this tokenizer
    return tokenizer


def conversation(prompt, turns, rng, forks=()):
    """Training rows of one completion; the turns whose numbers are in `forks` begin a row with another context."""
    rows, between = [], []
    for number, turn in enumerate(turns):
        if number == 0 or number in forks:
            context = [*prompt, *([5, 6 + number] if number else [])]
            rows.append(worker.TrainingSequence([*context], [0] * len(context), [0.0] * len(context), "a"))
            between = []
        row = rows[-1]
        for ids, trained in ((between, 0), (turn, 1)):
            row.input_ids.extend(ids)
            row.completion_mask.extend([trained] * len(ids))
            row.old_log_probs.extend((-2.0 - rng.random(len(ids)) * trained).tolist() if trained else [0.0] * len(ids))
        between = [8, 9]  # a tool's answer
    return rows


def group(number, seed=0, forks=True, unscored=True):
    """Four conversations of one prompt: two turns, two rows, of many lengths; one without a reward in some groups."""
    rng = np.random.default_rng([seed, number])
    prompt = [4, 5, 6 + number % 8]
    completions, ids, rows = [], [], []
    for i in range(G):
        turns = [rng.integers(11, 20, int(rng.integers(2, 5))).tolist() for _ in range(2 if i in (1, 2) else 1)]
        for turn in turns:
            turn[len(turn) // 2] = LINE_END
        reward = None if unscored and i == 3 and number % 2 else float(rng.integers(0, 4))
        completions.append([{"role": "assistant", "content": "", "reward": reward}])
        ids.append([token for turn in turns for token in turn])
        rows.append(conversation(prompt, turns, rng, forks=(1,) if forks and i == 1 else ()))
    count = [0] * G
    return worker.RolloutGroup([[]] * G, {}, completions, ids, rows, count, count, 0, number, [None] * G, [None] * G)


def loop_of(loop_class, functions, tokenizer):
    """A rollout loop in this process."""
    return loop_class(
        model_name="m", dataset=[{"prompt": []}], reward_funcs=functions, processing_class=tokenizer,
        eos_token_ids=[1], rollout_buffer=queue.Queue(), model_version_value=multiprocessing.Value("i", 0),
        heartbeat_value=multiprocessing.Value("d", 0.0), failed_event=None, exception_info_queue=None,
        metrics_queue=queue.Queue(), num_generations=G, max_inflight_tasks=4,
    )  # fmt: skip


def scored(loop, groups):
    """The samples that a rollout loop makes of groups."""
    return [sample for group in groups for sample in asyncio.run(loop._score_group(group))]


def batches_of(samples, parts=1):
    """The samples as micro-batches of one process, packed and collated by TRL."""
    collate = DataCollatorForRollout(0, 1)
    batches = []
    for part in np.array_split(np.arange(len(samples)), parts):
        row = TreeRow()
        for i in part:
            fields = ("input_ids", "completion_mask", "old_log_probs", "advantage", "group_id", "metrics")
            row.add({name: getattr(samples[i], name) for name in fields})
        batches.append(collate.torch_call([[row]]))
    return batches


class GivenWorker(worker.AsyncRolloutWorker):
    """TRL's worker, whose loop scores given groups in this process when it is started."""

    def __init__(self, groups, tokenizer, functions=(outcome,)):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        self._loop_kwargs = {"dataset_start_index": 0}
        self._make = functools.partial(loop_of, functions=[*functions], tokenizer=tokenizer)
        self._groups = groups

    def start(self):
        self.loop = self._make(self._loop_cls)
        self.samples = scored(self.loop, self._groups)
        for sample in self.samples:
            self.rollout_buffer.put(sample)

    def stop(self):
        pass

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        raise RuntimeError("there are no more samples")


class NoTransfer:
    """Weights that nobody samples with."""

    def init_weight_transfer(self):
        pass

    def pause(self):
        pass

    def send_weights(self, iterator):
        for _ in iterator:
            pass

    resume = destroy = pause


def build(trainer_class, config_class, model, output_dir, lora=False, groups=None, functions=(outcome,), **options):
    """A trainer over given groups; `options` are fields of the config, or arguments of the trainer."""
    from peft import LoraConfig

    settings = {
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2, "token_budget": -1, "max_staleness": 10**6, "num_generations": G,
        "max_steps": 2, "learning_rate": 1e-2, "optim": "sgd", "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, **options,
    }  # fmt: skip
    tokenizer = tokenizer_of(model)
    groups = [group(number) for number in range(40)] if groups is None else groups
    arguments = {"rollout_worker": GivenWorker(groups, tokenizer, functions), "weight_transfer": NoTransfer()}
    arguments |= {name: settings.pop(name) for name in [*settings] if name in ("rollout_worker", "callbacks", "tools")}
    return trainer_class(
        model=model,
        args=config_class(str(output_dir), **settings),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "ab"}]}] * 8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        **arguments,
    )
