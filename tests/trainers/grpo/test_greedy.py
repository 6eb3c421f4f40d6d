"""Greedy answers as a baseline: they are greedy, they are scored like the samples, and they leave no trace."""

import itertools
import math
import re

import pytest
import torch
from datasets import Dataset
from tiny import build, digits, logged, scripted_rollout
from transformers import AutoModelForCausalLM

from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.grpo.greedy import layout
from trl_ext.trainers.ppo import PPOConfig
from trl_ext.upstream import trl_class

REMAX = {"advantage_estimator": "remax", "per_device_train_batch_size": 6, "num_generations": 2}
WITHOUT = {**REMAX, "advantage_estimator": "reinforce"}
TRL = trl_class(GRPOTrainer)


class Seen(GRPOTrainer):
    """Keeps what was trained on, and what its methods were asked for."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("batches", []).append((inputs, output))
        return output


def greedy_answer(model, tokenizer, prompt, length=8):
    """One token after the other, without cache, padding or a generation config."""
    ids, answer = tokenizer(prompt)["input_ids"], []
    while len(answer) < length and (not answer or answer[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def expected_advantages(trainer, model, batch, reward=lambda text: digits([text])[0]):
    inputs, output = batch
    tokenizer, mask = trainer.processing_class, output["completion_mask"]

    def worth(ids):
        return reward(tokenizer.decode(ids, skip_special_tokens=True))

    answers = [worth(greedy_answer(model, tokenizer, row["prompt"])) for row in inputs]
    samples = [worth(ids[m.bool()].tolist()) for ids, m in zip(output["completion_ids"], mask, strict=True)]
    return (torch.tensor(samples) - torch.tensor(answers))[:, None] * mask, answers


# What the answers are


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_advantage_is_what_a_sample_is_better_than_the_greedy_answer(train, tiny_model, size):
    options = {"learning_rate": 0.05, "max_steps": 2, **REMAX, "num_generations": size}
    trainer = train(Seen, GRPOConfig, **options)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected, answers = expected_advantages(trainer, model, trainer.batches[0])
    torch.testing.assert_close(trainer.batches[0][1]["advantages"], expected)
    assert expected.unique().numel() > 3
    first = logged(trainer)[0]
    assert first["remax/baseline"] == pytest.approx(sum(answers) / len(answers))
    assert first["remax/baseline_length"] == 8.0 and first["remax/frac_baseline_unscored"] == 0.0
    assert first["remax/advantage_positive"] == pytest.approx((expected[:, 0] > 0).double().mean().item())


def test_the_answers_are_those_of_the_policy_of_the_step(train, tiny_model):
    one = train(Seen, GRPOConfig, **REMAX, learning_rate=0.5, lr_scheduler_type="constant", max_steps=1)
    two = train(Seen, GRPOConfig, **REMAX, learning_rate=0.5, lr_scheduler_type="constant", max_steps=2)
    before, after = (expected_advantages(two, m, two.batches[1]) for m in (
        AutoModelForCausalLM.from_pretrained(tiny_model), one.model
    ))  # fmt: skip
    assert before[1] != after[1]
    torch.testing.assert_close(two.batches[1][1]["advantages"], after[0])


def test_sampling_options_do_not_reach_the_answers(train, tiny_model):
    options = {"temperature": 1.7, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "generation_kwargs": {"num_beams": 1}}
    trainer = train(Seen, GRPOConfig, **REMAX, **options, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(
        trainer.batches[0][1]["advantages"], expected_advantages(trainer, model, trainer.batches[0])[0]
    )
    assert trainer.generation_config.do_sample and trainer.generation_config.temperature == 1.7


def characters_of_steps(completion_steps, **kwargs):
    return [[float(sum(c.isalnum() for c in step)) for step in steps] for steps in completion_steps]


def every_other(token_ids, tokenizer):
    return [*range(1, len(token_ids), 2)]


async def later(completions, **kwargs):
    return [len(text) / 8 for text in completions]


def test_steps_outcomes_and_coroutines_all_count(train, tiny_model):
    options = {"reward_funcs": [characters_of_steps, digits, later], "reward_weights": [1.0, 0.5, 2.0]}
    trainer = train(Seen, GRPOConfig, **REMAX, **options, step_ends_function=f"{__name__}.every_other", max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)

    def total(text):
        return sum(c.isalnum() for c in text) + 0.5 * digits([text])[0] + 2 * len(text) / 8

    expected, _ = expected_advantages(trainer, model, trainer.batches[0], total)
    advantages = trainer.batches[0][1]["advantages"]
    torch.testing.assert_close(advantages[:, 0], expected[:, 0])  # of the first token, to which all rewards come
    assert logged(trainer)[0]["process/steps_max"] > 1


def test_rewards_are_clipped_before_they_are_compared(train):
    trainer = train(Seen, GRPOConfig, **REMAX, reward_funcs=later, reward_clip_range=[0.0, 0.25], max_steps=1)
    returns = torch.tensor([min(len(text) / 8, 0.25) for text in trainer._logs["completion"]])
    torch.testing.assert_close(trainer.batches[0][1]["advantages"][:, 0], returns - 0.25)


def none_for_answers(completions, prompts, **kwargs):
    """The greedy answers come alone, one per prompt, and before the samples."""
    return [None if len(prompts) == 3 else 1.0] * len(completions)


def test_without_a_score_of_the_answers_nothing_is_learnt(train):
    trainer = train(Seen, GRPOConfig, **REMAX, reward_funcs=none_for_answers, max_steps=1)
    assert not trainer.batches[0][1]["advantages"].any()
    entry = logged(trainer)[0]
    assert entry["remax/frac_baseline_unscored"] == 1.0 and entry["remax/baseline"] is None  # NaN
    assert entry["reward"] == 1.0 and entry["loss"] == 0.0


# No trace


def counting(completions, log_extra, log_metric, **kwargs):
    """Draws random numbers, and tells the trainer about what it scores."""
    log_extra("length", [len(text) for text in completions])
    log_metric("noise", torch.rand(()).item())
    return digits(completions)


CASES = {
    "steps, KL, evaluation": {
        "reward_funcs": [counting, characters_of_steps, later],
        "step_separator": "b",
        "beta": 0.1,
        "kl_placement": "reward",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": Dataset.from_dict({"prompt": ["ab", "45", "g 1", "ef"]}),
    },
    "dropout": {"reward_funcs": counting},
}
OF_ADVANTAGES = ("advantages/", "loss", "grad_norm", "remax/", "process/steps_a", "time", "per_second")


@pytest.mark.parametrize("case", CASES)
def test_samples_and_logs_are_those_of_a_run_without_answers(tiny_model, tmp_path, case):
    """At learning rate 0, for else the second batch would be that of another policy."""
    trainers = []
    for options in (WITHOUT, REMAX):
        settings = {"learning_rate": 0.0, "max_steps": 4, **CASES[case], **options}
        trainer = build(Seen, GRPOConfig, tiny_model, tmp_path, **settings)
        for module in trainer.model.modules():
            if case == "dropout" and hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        trainer.train()
        trainers.append(trainer)
    without, answered = trainers
    for (_, expected), (_, output) in zip(without.batches, answered.batches, strict=True):
        assert torch.equal(expected["completion_ids"], output["completion_ids"])
    assert without.state.num_input_tokens_seen == answered.state.num_input_tokens_seen > 0
    for before, after in zip(*(trainer.state.log_history for trainer in trainers), strict=True):
        assert {name for name in after if "remax/" not in name} == before.keys()
        for name in before:
            if not any(word in name for word in OF_ADVANTAGES):
                assert before[name] == after[name] or math.isnan(before[name]), name
    assert without._logs["extra"] == answered._logs["extra"]
    assert without._logs["completion"] == answered._logs["completion"]


def test_the_state_of_the_trainer_is_put_back_when_a_reward_fails(tiny_model, tmp_path):
    def fails(completions, **kwargs):
        raise KeyError("answer")

    trainer = build(GRPOTrainer, GRPOConfig, tiny_model, tmp_path, **REMAX, reward_funcs=fails)
    names = ("num_generations", "num_generations_eval", "_metrics", "_logs", "_pending_metrics", "generation_config")
    before = {name: getattr(trainer, name) for name in names}
    with pytest.raises(RuntimeError, match="Reward function 'fails' raised KeyError: 'answer'"):
        trainer.train()
    assert all(getattr(trainer, name) is value for name, value in before.items()) and trainer._greedy is None


# Engines


class Engine:
    """As vLLM's: prompts of several processes and repeated ones come as a list of token ids."""

    def __init__(self):
        self.temperature, self.generation_kwargs, self.asked = 0.8, {"temperature": 0.9, "seed": 1}, []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        self.asked.append((len(prompts), num_generations, self.temperature, dict(self.generation_kwargs)))
        ids = [[3 + (i + len(self.asked)) % 15] * 3 for i in range(len(prompts))]
        return prompts, ids, [[[-1.0]] * 3 for _ in ids], None


def test_vllm_is_asked_at_temperature_0_for_one_answer_per_prompt(tiny_model, tmp_path):
    trainer = build(GRPOTrainer, GRPOConfig, tiny_model, tmp_path, **REMAX, max_steps=1)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1
    trainer.vllm_importance_sampling_correction = False
    trainer.train()
    assert trainer.vllm_generation.asked == [
        (6, 2, 0.8, {"temperature": 0.9, "seed": 1}), (3, 1, 0.0, {"seed": 1})
    ]  # fmt: skip
    assert trainer.vllm_generation.temperature == 0.8


@pytest.mark.parametrize("lora", [False, True])
def test_with_trls_defaults_it_trains(train, lora):
    trainer = train(
        GRPOTrainer, GRPOConfig, **REMAX, lora=lora, bf16=True, gradient_checkpointing=True, beta=0.1,
        kl_placement="reward",
    )  # fmt: skip
    assert all(math.isfinite(entry["loss"]) for entry in logged(trainer))


# What is refused


def test_other_sources_of_completions_are_refused_before_a_model_loads(tmp_path):
    for argument in ("rollout_func", "environment_factory"):
        with pytest.raises(ValueError) as error:
            GRPOTrainer(
                model="no/such-model", reward_funcs=digits, args=GRPOConfig(str(tmp_path), **REMAX, bf16=False),
                **{argument: scripted_rollout},
            )  # fmt: skip
        assert str(error.value) == (
            f"advantage_estimator='remax' generates a greedy answer of its own, which {argument} does not offer. Use "
            "'reinforce', 'reinforce_plus_plus'."
        )


def test_neither_the_baseline_nor_anything_else_is_an_option():
    with pytest.raises(ValueError, match=re.escape("advantage_kwargs has no 'baseline' for 'remax'; it takes [].")):
        GRPOConfig("out", **REMAX, bf16=False, advantage_kwargs={"baseline": 1.0})


def test_ppo_has_its_own_baseline():
    with pytest.raises(ValueError, match="advantage_estimator must be 'gae', got 'remax'"):
        PPOConfig("out", advantage_estimator="remax", bf16=False)


# Subclasses


def sampled_whatever_is_asked(self, *args, **kwargs):
    """Sets up its own sampling on the way, as a schedule of the temperature would."""
    self.generation_config.do_sample, self.generation_config.temperature = True, 1.3
    return super(type(self), self)._generate_single_turn(*args, **kwargs)


def own_generate(self, prompts):
    return TRL._generate(self, prompts)


@pytest.mark.parametrize("methods", [
    {"_generate_single_turn": sampled_whatever_is_asked},
    {"_generate": own_generate},
], ids=["sampling of its own", "a copy of TRL's method"])  # fmt: skip
def test_the_answers_stay_greedy_in_a_subclass(tiny_model, tmp_path, methods):
    cls = type("Subclass", (Seen,), methods)
    trainer = build(cls, GRPOConfig, tiny_model, tmp_path, **REMAX, max_steps=1)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(
        trainer.batches[0][1]["advantages"], expected_advantages(trainer, model, trainer.batches[0])[0]
    )


def own_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
    return [[3, 4, 5] for _ in prompt_ids], None


def own_batch(self, prompts):
    return [[2]] * len(prompts), [[3]] * len(prompts), None, ["b"] * len(prompts), None, {}, None, []


@pytest.mark.parametrize(("method", "override"), [("_generate_single_turn", own_turn), ("_generate", own_batch)])
def test_a_subclass_with_a_generator_of_its_own_is_told_so(tiny_model, tmp_path, method, override):
    cls = type("Subclass", (GRPOTrainer,), {method: override})
    trainer = build(cls, GRPOConfig, tiny_model, tmp_path, **REMAX)
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert str(error.value) == (
        f"{__name__}.Subclass overrides {method} without calling that of GRPOTrainer, so that advantage_estimator="
        f"'remax', whose baseline is a greedy answer, has no effect with it. Call super().{method}(...) there and "
        "change its result, or remove the option."
    )


def test_a_subclass_that_returns_more_than_was_asked_for_is_told_so(tiny_model, tmp_path):
    class Twice(GRPOTrainer):
        def _generate(self, prompts):
            return super()._generate(prompts * 2 if len(prompts) == 3 else prompts)

    trainer = build(Twice, GRPOConfig, tiny_model, tmp_path, **REMAX)
    with pytest.raises(ValueError, match="Twice overrides _generate and returns 6 completions for 3 prompts"):
        trainer.train()


# Which process answers what


def test_every_prompt_is_answered_and_every_process_answers_as_often():
    for rows, size, processes in itertools.product(range(1, 8), range(1, 9), range(1, 5)):
        asked, places = layout(rows, size, processes)
        most = max(((r + 1) * rows - 1) // size - (r * rows) // size + 1 for r in range(processes))
        assert [len(own) for own in asked] == [most] * processes and most <= rows
        gathered = [rank * rows + i for rank, own in enumerate(asked) for i in own]
        assert [gathered[place] // size for place in places] == [row // size for row in range(rows * processes)]
        assert all(places[a] == places[a - 1] for a in range(1, len(places)) if a % size), "one answer per prompt"
