"""What the rollout process makes of a group, and the training process of a step, against the functions themselves."""

import functools
import pickle
import types
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.engine import LINE_END, G, batches_of, group, lengths, loop_of, outcome, scored, tokenizer_of, worker
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout, FixedCountBatcher

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS
from trl_ext.functional.rewards import RewardBatch, reward_at_end, reward_at_steps
from trl_ext.trainers.async_grpo.child import ScoringOptions, scoring_loop
from trl_ext.trainers.async_grpo.layout import Layout
from trl_ext.trainers.async_grpo.step import StepAdvantages
from trl_ext.trainers.foreign import Options

HERE = {name: row for name, row in ADVANTAGE_ESTIMATORS.items() if row.within is not None}
# Rows that are refused although they need neither a critic nor a baseline, and why.
NOT_HERE = {
    "gpg": "its factor counts the groups of a batch that have a signal, and the trainer sees rows without groups",
    "prime": "rewards every token by a model that is trained on the outcomes of whole batches",
}


class OneProcess:
    num_processes, process_index, is_main_process = 1, 0, True

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor

    def pad_across_processes(self, tensor, dim):
        return tensor


def trainer_like(estimator, **options):
    """As much of a trainer as `StepAdvantages` reads."""
    fields = {"process_weight": 1.0, "outcome_weight": 1.0, "step_separator": "b", "num_generations": 1, **options}
    config = types.SimpleNamespace(advantage_estimator=estimator, **fields)
    metrics = {"train": defaultdict(list)}
    trainer = types.SimpleNamespace(accelerator=OneProcess(), args=config, beta=0.0, _metrics=metrics)
    trainer.advantages = StepAdvantages(trainer, Options(config))
    return trainer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tokenizer_of(tiny_model)


@pytest.fixture
def make(tokenizer):
    """`make(estimator, functions, **options)`: a trainer's object and the loop of its rollout process."""

    def make(estimator, functions=(outcome,), base=worker._AsyncRolloutLoop, **options):
        trainer = trainer_like(estimator, **options)
        made = functools.partial(scoring_loop, base, trainer.advantages.for_the_child())
        return trainer, loop_of(pickle.loads(pickle.dumps(made)), [*functions], tokenizer)

    return make


def through(trainer, samples, parts=1):
    """The advantages of every sample's trained tokens, one after the other, as the loss sees them."""
    batches = batches_of(samples, parts)
    trainer.advantages.take_apart(batches)
    trainer.advantages.finish(batches, None)
    assert all(batch["old_log_probs"].shape == batch["advantages"].shape for batch in batches)
    return torch.cat([batch["advantages"][batch["token_index"] >= 0] for batch in batches])


def whole_batch(groups, steps=None):
    """All groups as the synchronous trainer's `RewardBatch`, with or without outcomes and steps."""
    ids = [completion for group in groups for completion in group.completions_ids]
    mask = torch.arange(max(map(len, ids))) < torch.tensor([len(completion) for completion in ids])[:, None]
    rewards = [c[-1]["reward"] for group in groups for c in group.completions]
    if steps == "only":
        rewards = [None] * len(rewards)
    returns = torch.tensor([torch.nan if r is None else r for r in rewards], dtype=torch.float64)
    found = {}
    if steps:
        ends = [step_ends(g, i) for g in groups for i in range(G)]
        values = [
            [None if j == 1 else float(b - a) for j, (a, b) in enumerate(zip([-1, *e], e, strict=False))] for e in ends
        ]
        found = dict(zip(("steps", "steps_scored"), reward_at_steps(values, ends, mask.size(1)), strict=True))
    return RewardBatch(*reward_at_end(returns, mask), mask.long(), G, **found)


def step_ends(group, i):
    """Where steps end, by hand: at the separator and at the end of a turn."""
    runs, position, ends = [], 0, []
    for row in group.completions_sequences[i]:
        masks = [0, *row.completion_mask, 0]
        starts = [t for t in range(1, len(masks)) if masks[t] and not masks[t - 1]]
        runs += [masks[start:].index(0) for start in starts]
    for run in runs:
        turn = group.completions_ids[i][position : position + run]
        ends += [position + t for t, token in enumerate(turn) if token == LINE_END or t == run - 1]
        position += run
    return ends


def in_flat_order(advantages, batch):
    per_token = advantages if advantages.dim() == 2 else advantages[:, None].expand(batch.mask.shape)
    return per_token[batch.mask.bool()].float()


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_every_row_says_what_is_done_within_a_prompt(name):
    row = ADVANTAGE_ESTIMATORS[name]
    not_here = row.values or row.baseline or name in NOT_HERE
    assert (row.within is not None) != not_here, (
        f"the row of {name!r} must say `within` (and `across`, if statistics cross prompts), unless it needs a critic "
        "or a baseline, which the rollout process does not have; or NOT_HERE must say why it cannot be brought here"
    )
    assert row.across is None or (ADVANTAGE_ESTIMATORS[row.across].across == row.across and row.per_token)
    assert (row.within is row.function) == (row.within is not None and row.across is None)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("unscored", [False, True])
@pytest.mark.parametrize("name", [name for name, row in HERE.items() if row.steps != "needed"])
def test_outcomes_become_what_the_function_makes_of_the_whole_batch(make, name, unscored, parts):
    groups = [group(number, unscored=unscored) for number in range(3)]
    trainer, loop = make(name)
    batch = whole_batch(groups)
    expected = in_flat_order(HERE[name].function(batch), batch)
    torch.testing.assert_close(through(trainer, scored(loop, groups), parts), expected, rtol=1e-5, atol=1e-6)
    assert expected.unique().numel() > 1


@pytest.mark.parametrize("steps", ["only", "too"])
@pytest.mark.parametrize("name", [name for name, row in HERE.items() if row.steps != "refused"])
def test_rewards_of_steps_too(make, name, steps):
    groups = [group(number) for number in range(3)]
    trainer, loop = make(name, [lengths] if steps == "only" else [outcome, lengths])
    batch = whole_batch(groups, steps)
    expected = in_flat_order(HERE[name].function(batch), batch)
    samples = scored(loop, groups)
    torch.testing.assert_close(through(trainer, samples, 2), expected, rtol=1e-5, atol=1e-6)
    assert expected.unique().numel() > 7 and all(s.metrics["process/steps_mean"] > 2 for s in samples)


def test_options_reach_the_half_that_reads_them(make):
    groups = [group(number, forks=False) for number in range(3)]
    batch = whole_batch(groups, "too")
    for name, options in (
        ("reinforce_plus_plus", {"gamma": 0.5, "weighting": "sequence", "correction": 1}),
        ("reinforce_plus_plus_baseline", {"norm": "center"}),
        ("process_group_relative", {"credit": "min"}),
    ):
        weights = {"process_weight": 0.5} if name.startswith("process") else {}
        trainer, loop = make(name, [outcome, lengths], advantage_kwargs=options, **weights)
        expected = in_flat_order(HERE[name].function(batch, **options, **weights), batch)
        torch.testing.assert_close(through(trainer, scored(loop, groups)), expected, rtol=1e-5, atol=1e-6)


def test_a_users_function_sees_one_group_at_a_time(make):
    groups = [group(number, unscored=False) for number in range(2)]
    samples = scored(make("test_child.of_a_user", advantage_kwargs={"scale": 2.0})[1], groups)
    rewards = [c[-1]["reward"] for g in groups for c in g.completions]
    expected = [2.0 * (r - max(rewards[i // G * G :][:G])) for i, r in enumerate(rewards)]
    rows = [value for i, value in enumerate(expected) for _ in groups[i // G].completions_sequences[i % G]]
    assert [sample.advantage for sample in samples] == pytest.approx(rows)
    for wrong, message in (("wrong_shape", r"returned \(8,\)|returned \(5,\)"), ("infinite", "NaN or infinite")):
        with pytest.raises(ValueError, match=message):
            scored(make(f"test_child.{wrong}")[1], groups)


def of_a_user(batch, *, scale=1.0):
    assert batch.num_generations == len(batch.outcome) == G
    returns = batch.outcome.sum(1)
    return scale * (returns - returns.max())


def wrong_shape(batch):
    return torch.zeros(5)


def infinite(batch):
    return torch.full((G,), torch.inf)


# Conversations that are not as they were sampled


def test_a_conversation_without_row_counts_in_the_baseline(make):
    given = group(0, forks=False)
    for completion, reward in zip(given.completions, [0.0, 3.0, 1.0, 2.0], strict=True):
        completion[-1]["reward"] = reward
    given.completions_sequences[1], given.completions_ids[1] = [], []
    samples = scored(make("leave_one_out")[1], [given])
    assert [s.advantage for s in samples] == pytest.approx([0 - 2, 1 - 5 / 3, 2 - 4 / 3])
    assert given.completions_sequences[1] == [], "TRL's group is as it was"


def test_a_realigned_turn_has_no_steps_but_its_outcome(make):
    given = group(0, forks=False)
    row = given.completions_sequences[1][0]
    row.completion_mask[row.completion_mask.index(1)] = 0  # as TRL demotes it to context
    loop = make("process_group_relative", [lengths])[1]
    samples = scored(loop, [given])
    assert np.isnan(samples[1].old_log_probs[:, 1]).all() and loop._counters["process/realigned_total"] == 1
    trained = samples[0].completion_mask == 1
    assert np.isfinite(samples[0].old_log_probs[trained, 1]).all()
    loop = make("process_group_relative", [outcome, lengths])[1]
    samples = scored(loop, [given])
    values = samples[1].old_log_probs[samples[1].completion_mask == 1, 1]
    returns = torch.tensor([[c[-1]["reward"] for c in given.completions]], dtype=torch.float64)
    expected = (returns - returns.mean()) / (returns.std() + 1e-4)
    assert values == pytest.approx([expected[0, 1].item()] * len(values), rel=1e-5), "the outcome alone"


def test_a_reward_to_go_goes_on_in_the_next_row_of_a_conversation(make):
    given = group(0)
    given.completions[1][-1]["reward"] = 3.0
    trainer, loop = make("reinforce", [outcome, lengths])
    samples = [sample for sample in scored(loop, [given]) if len(given.completions_sequences[1]) == 2][1:3]
    batch = whole_batch([given], "too")
    expected = HERE["reinforce"].function(batch)[1, : len(given.completions_ids[1])]
    got = through(trainer, samples)
    torch.testing.assert_close(got, expected.float())
    assert got[0] > 3.0 + samples[1].completion_mask.sum() - 1, "steps of both rows, and the outcome"


def test_a_group_without_any_reward_takes_no_part(make):
    given = [group(0, unscored=False), group(1)]
    for completion in given[1].completions:
        completion[-1]["reward"] = None
    for name in ("leave_one_out", "reinforce_plus_plus", "test_child.of_a_user"):
        trainer, loop = make(name)
        with pytest.warns(UserWarning, match="No completion of the batch"):
            samples = scored(loop, given)
        rows = sum(map(len, given[0].completions_sequences))
        advantages = through(trainer, samples)
        count = sum(int(s.completion_mask.sum()) for s in samples[:rows])
        assert not advantages[count:].any() and advantages[:count].any()
        (mean,), (std,) = (trainer._metrics["train"][f"advantages/{key}"] for key in ("mean", "std"))
        assert mean == pytest.approx(advantages[:count].mean().item(), abs=1e-6)
        assert std == pytest.approx(advantages[:count].std(correction=0).item(), abs=1e-6)


# Rewards


def again(completions, **kwargs):
    return [None if reward is None else 10 * reward for reward in outcome(completions)]


again.__name__ = "outcome"


def test_weights_range_and_functions_of_one_name(make):
    groups = [group(number) for number in range(2)]
    options = {"reward_weights": [1.0, 0.1], "reward_clip_range": [0.0, 4.0]}
    samples = scored(make("group_mean", [outcome, again], **options)[1], groups)
    rewards = torch.tensor(
        [[torch.nan if r is None else 2.0 * r for r in outcome(g.completions)] for g in groups], dtype=torch.float64
    )
    clipped = rewards.clamp(max=4.0)
    expected = (clipped - clipped.nanmean(1, keepdim=True)).nan_to_num()
    owners = [(n, i) for n, g in enumerate(groups) for i, rows in enumerate(g.completions_sequences) for _ in rows]
    assert [s.advantage for s in samples] == pytest.approx([expected[at].item() for at in owners], abs=1e-6)
    for sample, at in zip(samples, owners, strict=True):
        assert sample.metrics["reward"] == pytest.approx(rewards[at].item(), nan_ok=True)
        assert sample.metrics["rewards/outcome"] == pytest.approx(5 * rewards[at].item(), nan_ok=True), "of the second"
        assert "rewards/0" not in sample.metrics


def test_an_environments_reward_is_one_more(make, tokenizer):
    class Environment:
        pass

    given = group(0, unscored=False)
    given.env_rewards = [(Environment, float(i)) for i in range(G)]
    trainer, loop = make("reinforce", reward_weights=[0.0, 1.0])
    loop._env_reward_types, loop.reward_func_names = [Environment], ["outcome", "Environment"]
    samples = scored(loop, [given])
    owners = [i for i, rows in enumerate(given.completions_sequences) for _ in rows]
    assert [s.metrics["rewards/Environment"] for s in samples] == owners
    advantages = through(trainer, samples)
    assert advantages.tolist() == [
        float(i) for i, s in zip(owners, samples, strict=True) for _ in range(s.completion_mask.sum())
    ]


def fails(completions, **kwargs):
    raise KeyError("of its own")


def lists(completions, **kwargs):
    return [[1.0]] * len(completions)


def both(completions, **kwargs):
    return [[1.0, 2.0, 3.0, 4.0], *[1.0] * (len(completions) - 1)]


def endless(completions, **kwargs):
    return [float("inf")] * len(completions)


@pytest.mark.parametrize(
    ("estimator", "function", "message"),
    [
        ("leave_one_out", fails, "Reward function 'fails' raised KeyError: 'of its own'"),
        ("leave_one_out", lengths, "would add up the step rewards of a completion"),
        (
            "process_group_relative",
            outcome,
            "needs a reward function that returns one list per completion; got numbers",
        ),
        ("process_group_relative", both, "'both' returned both numbers and lists"),
        ("process_group_relative", lists, "returned 1 step rewards for completion 0, which has 2 steps"),
        ("reinforce_plus_plus", endless, "'endless' returned inf for completion 0"),
    ],
)
def test_what_a_reward_function_does_wrong_is_said(make, estimator, function, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        scored(make(estimator, [function])[1], [group(0, unscored=False)])


def test_completions_that_are_never_cut_are_said_once(make):
    given = [group(number, forks=False) for number in range(20)]
    for each in given:
        each.completions_ids = [[5, 6]] * G
        each.completions_sequences = [[worker.TrainingSequence([4, 5, 6], [0, 1, 1], [0.0] * 3, "a")]] * G
    loop = make("process_group_relative", [lengths])[1]
    with pytest.warns(UserWarning, match=r"Each of the 64 completions of the first groups is one step") as caught:
        scored(loop, given)
    assert len(caught) == 1


def test_without_an_option_the_loop_is_trls(make):
    assert isinstance(make("leave_one_out")[1], worker._AsyncRolloutLoop)
    assert (
        ScoringOptions("leave_one_out", {}, None, None, "\n", None)
        == trainer_like("leave_one_out", step_separator="\n").advantages.for_the_child()
    )


# Through packing


@st.composite
def trees(draw):
    """Rows of tokens with common beginnings: each continues an earlier one from somewhere on, or begins anew."""
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(1, 7))):
        kept = rows[draw(st.integers(0, len(rows) - 1))] if rows and draw(st.booleans()) else []
        kept = kept[: draw(st.integers(0, len(kept)))]
        rows.append([*kept, *draw(st.lists(st.integers(0, 3), min_size=2, max_size=5))])
    return [
        (row, [0, *(draw(st.lists(st.sampled_from([0, 1, 1]), min_size=len(row) - 1, max_size=len(row) - 1)))])
        for row in rows
    ]


@given(trees(), st.integers(1, 3), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_numbers_of_tokens_arrive_unchanged_through_packing(rows, processes, random):
    samples = [
        {
            "input_ids": np.array(ids), "completion_mask": np.array(mask), "advantage": 0.0, "group_id": i // 2,
            "metrics": {},
            "old_log_probs": np.array([[random.random(), random.choice([2.0, 0.1, np.nan])] for _ in ids], np.float32),
        }
        for i, (ids, mask) in enumerate(rows)
        if any(mask)
    ]  # fmt: skip
    if len(samples) < processes:
        return
    (packed,) = FixedCountBatcher(samples, processes, len(samples))
    batch = DataCollatorForRollout(0, processes).torch_call([packed])
    for rank, row in enumerate(packed):  # what the dispatcher gives to this process
        own = {name: value[rank : rank + 1] for name, value in batch.items()}
        layout = Layout(own)
        for column in (0, 1):
            flat = own["old_log_probs"][..., column]
            dense = layout.dense(flat)
            for sample, numbers, mask in zip(row.samples, dense, layout.mask, strict=True):
                sent = sample["old_log_probs"][sample["completion_mask"] == 1, column]
                np.testing.assert_array_equal(numbers[mask].numpy(), sent)
            np.testing.assert_array_equal(layout.flat(dense)[layout.selected], flat[layout.selected])
