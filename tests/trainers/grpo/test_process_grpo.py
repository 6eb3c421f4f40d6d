"""Step rewards in the GRPO trainer: what functions receive and may return, where rewards go, what is logged."""

import numpy as np
import pytest
import torch
import trl
from theorems import proves
from tiny import CHARACTERS, assert_same_weights, digits, logged, save_model, scripted_rollout, weights
from tiny.recorder import SEEN
from tokenizers import decoders
from torch.nn.functional import pad
from transformers import AutoTokenizer

from trl_ext.functional.advantages import group_relative
from trl_ext.functional.process_rewards import step_advantages
from trl_ext.functional.rewards import RewardBatch
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer

OURS = (GRPOTrainer, GRPOConfig)
PGR = {"advantage_estimator": "process_group_relative", "step_separator": " "}
LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """As for all tests, but its tokenizer puts no spaces between the characters."""
    path = save_model(tmp_path_factory.mktemp("fused") / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(path)
    return path


def by_letters(completions, completion_steps, **kwargs):
    """Share of letters in each step."""
    return [[sum(c in LETTERS for c in step) / (len(step) + 1) for step in steps] for steps in completion_steps]


def spaced_rollout(prompts, trainer) -> dict:
    """As `scripted_rollout`, with completions of several steps, one of them within tool output."""
    rollout = scripted_rollout(prompts, trainer)
    space = 2 + CHARACTERS.index(" ")
    for row, ids in enumerate(rollout["completion_ids"]):
        mask = rollout["env_mask"][row]
        for t in range(len(ids)):
            if (t + row) % 3 == 1:
                ids[t] = space
        assert len(ids) == len(mask)
    return rollout


class Spy(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.seen = output
        return output


def steps_by_hand(ids, mask):
    """Tokens are characters here, so a step ends on a space or before tool output; blanks join the step before."""
    steps, turn = [], []
    for t in range(len(ids) + 1):
        if t < len(ids) and mask[t]:
            turn.append(t)
            continue
        pieces, piece = [], []
        for place in turn:
            piece.append(place)
            if CHARACTERS[ids[place] - 2] == " ":
                pieces.append(piece)
                piece = []
        pieces += [piece] if piece else []
        blank = [all(CHARACTERS[ids[place] - 2] == " " for place in p) for p in pieces]
        merged = []
        for p, empty in zip(pieces, blank, strict=True):
            waits = bool(merged) and merged[-1][1]
            if merged and (empty or waits):
                merged[-1] = (merged[-1][0] + p, waits and empty)
            else:
                merged.append((p, empty))
        steps += [p for p, _ in merged]
        turn = []
    return steps


def batch_by_hand(trainer):
    """Step rewards of `by_letters` of the last rollout on its tokens: rewards, scored and mask in float64."""
    rows = [(seen, mask) for seen, mask in zip(trainer.seen["completion_ids"].tolist(), trainer.masks, strict=True)]
    width = trainer.seen["completion_ids"].size(1)
    rewards, scored = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (ids, mask) in enumerate(rows):
        for step in steps_by_hand(ids[: len(mask)], mask):
            text = "".join(CHARACTERS[ids[t] - 2] for t in step)
            rewards[row, step[-1]] = sum(c in LETTERS for c in text) / (len(text) + 1)
            scored[row, step[-1]] = True
    mask = torch.stack([pad(torch.tensor(mask), (0, width - len(mask))) for _, mask in rows])
    return rewards.double(), scored, mask


def spy(train, **options):
    """A trainer after one step on `spaced_rollout`, and the tokens that it trained on."""
    masks = []

    def rollout(prompts, trainer):
        result = spaced_rollout(prompts, trainer)
        masks[:] = result["env_mask"]
        return result

    settings = {"rollout_func": rollout, "reward_funcs": by_letters, "max_steps": 1, **PGR, **options}
    trainer = train(Spy, OURS[1], **settings)
    trainer.masks = masks
    return trainer


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=0)


# Positions and advantages


def test_step_rewards_reach_the_sampled_tokens_also_around_tool_output(train):
    trainer = spy(train)
    rewards, scored, mask = batch_by_hand(trainer)
    assert (mask.sum(1) < torch.tensor([len(m) for m in trainer.masks])).any(), "otherwise there is no tool output"
    assert (scored.sum(1) > 2).any()
    expected = step_advantages(rewards, scored, mask, 4)
    close(trainer.seen["advantages"], expected)
    per_row = (expected * mask).sum(1) / mask.sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(per_row.tolist(), abs=1e-6)


@pytest.mark.theorem(
    "Side by side with TRL",
    "One step per completion: process supervision trains to the weights of outcome supervision",
    paper="deepseekmath",
    at_most=0,
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_one_step_per_completion_trains_as_outcome_grpo_bit_for_bit(train, loss_type):
    def one_step(completions, completion_steps, **kwargs):
        assert all(len(steps) == 1 for steps in completion_steps)
        return [[value] for value in digits(completions)]

    options = {"loss_type": loss_type, "per_device_train_batch_size": 8}
    by_step = train(*OURS, advantage_estimator="process_group_relative", reward_funcs=one_step, **options)
    outcome = train(*OURS, advantage_estimator="group_relative", **options)
    assert_same_weights(by_step, outcome)
    proves(weights(by_step), weights(outcome))
    assert any(value for value in outcome._logs["advantages"])
    assert [e["loss"] for e in logged(by_step)] == [e["loss"] for e in logged(outcome)]


def test_functions_may_be_async_or_objects_and_may_return_tensors_and_arrays(train):
    async def asynchronous(**kwargs):
        return by_letters(**kwargs)

    class Object:
        def __call__(self, completions, completion_steps, **kwargs):
            return [torch.tensor(row) for row in by_letters(completions, completion_steps)]

    class AsyncObject:
        async def __call__(self, completions, completion_steps, **kwargs):
            return [np.array(row) for row in by_letters(completions, completion_steps)]

    expected = spy(train).seen["advantages"]
    for function in (asynchronous, Object(), AsyncObject()):
        trainer = spy(train, reward_funcs=function)
        close(trainer.seen["advantages"], expected)
        name = getattr(function, "__name__", type(function).__name__)
        assert trainer.reward_func_names == [name] and f"rewards/{name}/mean" in logged(trainer)[0]
        assert trainer.reward_funcs == [function], "the trainer keeps the function itself"


def test_positions_and_texts_are_handed_over(train):
    def check(completions, completion_ids, completion_steps, completion_step_ends, **kwargs):
        for ids, steps, ends in zip(completion_ids, completion_steps, completion_step_ends, strict=True):
            assert len(steps) == len(ends) and (not ends or ends[-1] < len(ids))
            assert all(isinstance(step, str) for step in steps)
        seen.extend(zip(completion_steps, completion_step_ends, strict=True))
        return [[0.5] * len(steps) for steps in completion_steps]

    seen = []
    trainer = spy(train, reward_funcs=check)
    rows = zip(seen, trainer.seen["completion_ids"].tolist(), trainer.masks, strict=True)
    for (texts, ends), ids, mask in rows:
        steps = steps_by_hand(ids[: len(mask)], mask)
        assert ends == [step[-1] for step in steps]
        assert texts == ["".join(CHARACTERS[ids[t] - 2] for t in step) for step in steps]


def test_outcome_and_process_rewards_are_normalised_separately_and_added(train):
    options = {"process_weight": 0.5, "outcome_weight": 2.0, "reward_weights": [3.0, 1.0]}
    trainer = spy(train, reward_funcs=[by_letters, digits], **options)
    rewards, scored, mask = batch_by_hand(trainer)
    of_steps = step_advantages(3 * rewards, scored, mask, 4)
    outcome = torch.tensor(digits(list(trainer._logs["completion"])), dtype=torch.float64)
    at_first = torch.arange(mask.size(1)) == 0
    per_row = group_relative(RewardBatch(outcome[:, None] * at_first, at_first.expand(mask.shape), mask, 4))
    expected = 0.5 * of_steps + 2.0 * per_row[:, None] * mask
    close(trainer.seen["advantages"], expected)
    sizes = (0.5 * of_steps).abs().sum(), (2.0 * per_row[:, None] * mask).abs().sum()
    share = (sizes[0] / sum(sizes)).item()
    assert logged(trainer, "process/advantage_share") == [[pytest.approx(share, abs=1e-6)]]


@pytest.mark.parametrize("weights", [{"process_weight": 0.0}, {"outcome_weight": 0.0}])
def test_a_source_of_weight_zero_is_left_out(train, weights):
    trainer = spy(train, reward_funcs=[by_letters, digits], **weights)
    if "outcome_weight" in weights:
        close(trainer.seen["advantages"], spy(train).seen["advantages"])
    else:
        alone = spy(train, advantage_estimator="group_relative", step_separator="\n", reward_funcs=digits)
        mask = batch_by_hand(trainer)[2]
        close(trainer.seen["advantages"], alone.seen["advantages"][:, None] * mask)


def test_several_process_functions_are_added_over_those_that_scored_a_step(train):
    def second_steps(completions, completion_steps, **kwargs):
        return [None if i == 2 else [None, 7.0, *[0.0] * 9][: len(s)] for i, s in enumerate(completion_steps)]

    trainer = spy(train, reward_funcs=[by_letters, second_steps], reward_weights=[1.0, 0.1])
    rewards, scored, mask = batch_by_hand(trainer)
    for row in range(4):
        places = scored[row].nonzero().flatten()
        if row != 2 and len(places) > 1:
            rewards[row, places[1]] += 0.7
    close(trainer.seen["advantages"], step_advantages(rewards, scored, mask, 4))


def test_unscored_steps_are_dropped_and_counted(train):
    def some(completions, completion_steps, **kwargs):
        values = by_letters(completions, completion_steps)
        return [None if i == 1 else [None, *row[1:]] if i == 2 else row for i, row in enumerate(values)]

    trainer = spy(train, reward_funcs=some)
    rewards, scored, mask = batch_by_hand(trainer)
    total = scored.sum().item()
    scored[1] = False
    scored[2, scored[2].nonzero()[0]] = False
    close(trainer.seen["advantages"], step_advantages(rewards * scored, scored, mask, 4))
    metrics = logged(trainer)[0]
    assert metrics["process/frac_steps_unscored"] == pytest.approx(1 - scored.sum().item() / total)
    assert metrics["process/step_reward_mean"] == pytest.approx(rewards[scored].mean().item())


def test_a_batch_in_which_nothing_was_scored_does_nothing(train):
    with pytest.warns(UserWarning, match="No completion of the batch has both a reward"):
        trainer = spy(train, reward_funcs=lambda completions, **kwargs: [None] * len(completions))
    assert not trainer.seen["advantages"].any()


def test_steps_of_masked_truncated_completions_count_in_the_statistics(train):
    def rollout(prompts, trainer):
        result = spaced_rollout(prompts, trainer)
        for row in (0, 2):
            result["completion_ids"][row].append(1)  # <eos>: these are not truncated
            result["env_mask"][row].append(1)
            result["logprobs"][row].append(0.0)
        masks[:] = result["env_mask"]
        return result

    masks = []
    trainer = train(
        Spy,
        OURS[1],
        rollout_func=rollout,
        mask_truncated_completions=True,
        reward_funcs=by_letters,
        max_steps=1,
        **PGR,
    )
    ids = [row[: len(mask)] for row, mask in zip(trainer.seen["completion_ids"].tolist(), masks, strict=True)]
    rewards = torch.zeros(trainer.seen["advantages"].shape)
    scored = torch.zeros(rewards.shape, dtype=torch.bool)
    for row in range(4):
        ended = row in (0, 2)
        steps = steps_by_hand(ids[row][:-1] if ended else ids[row], masks[row][:-1] if ended else masks[row])
        if ended:
            steps[-1] = [*steps[-1], len(ids[row]) - 1]  # these rows have no tool output
        for step in steps:
            text = "".join(CHARACTERS[ids[row][t] - 2] for t in step if ids[row][t] > 1)
            rewards[row, step[-1]] = sum(c in LETTERS for c in text) / (len(text) + 1)
            scored[row, step[-1]] = True
    mask = trainer.seen["completion_mask"] * trainer.seen["tool_mask"]
    assert not mask[[1, 3]].any() and mask[[0, 2]].any()
    close(trainer.seen["advantages"], step_advantages(rewards.double(), scored, mask, 4))


def test_reinforce_plus_plus_and_functions_by_path_see_the_sum_of_both_sources(train):
    trainer = spy(
        train, reward_funcs=[by_letters, digits], advantage_estimator="tiny.recorder.record", reward_weights=[2.0, 1.0]
    )
    rewards, scored, mask = batch_by_hand(trainer)
    outcome = torch.tensor(digits(list(trainer._logs["completion"])), dtype=torch.float64)
    expected = 2 * rewards
    for row in range(4):
        last = mask[row].nonzero().max()
        expected[row, last] += outcome[row]
        assert SEEN["batch"].steps_scored[row].tolist() == scored[row].tolist(), "a step ends on the last token anyway"
    close(SEEN["batch"].rewards, expected)
    whitened = spy(train, advantage_estimator="reinforce_plus_plus")
    values = whitened.seen["advantages"][mask.bool()]
    assert values.mean().abs() < 1e-5 and abs(values.std(correction=0) - 1) < 1e-4
    assert logged(whitened)[0]["process/steps_mean"] == pytest.approx(scored.sum(1).double().mean().item())


def test_outcome_functions_may_read_the_steps_too(train):
    def fewest(completions, completion_steps, **kwargs):
        return [-float(len(steps)) for steps in completion_steps]

    def untouched(completions, **kwargs):
        assert not kwargs.keys() & {"completion_steps", "completion_step_ends"}, "only where step rewards are needed"
        return [0.0] * len(completions)

    options = {"advantage_estimator": "group_relative", "step_separator": " ", "max_steps": 1}
    trainer = train(*OURS, reward_funcs=[fewest, untouched], rollout_func=spaced_rollout, **options)
    trainer.state.global_step = 0
    rollout = spaced_rollout(list(trainer._logs["prompt"]), trainer)
    pairs = zip(rollout["completion_ids"], rollout["env_mask"], strict=True)
    assert list(trainer._logs["rewards"]["fewest"]) == [-float(len(steps_by_hand(*pair))) for pair in pairs]


def halves(token_ids, tokenizer):
    return [(len(token_ids) - 1) // 2]


def test_a_step_ends_function_by_dotted_path(train):
    def two(completions, completion_steps, completion_step_ends, completion_ids, **kwargs):
        assert [len(ends) for ends in completion_step_ends] == [min(2, len(ids)) for ids in completion_ids]
        return [[0.0, 1.0][: len(steps)] for steps in completion_steps]

    options = {"advantage_estimator": "process_group_relative", "step_ends_function": "test_process_grpo.halves"}
    trainer = train(*OURS, reward_funcs=two, max_completion_length=8, max_steps=1, **options)
    assert logged(trainer)[0]["process/steps_max"] == 2.0


def test_a_reward_model_of_trl_stays_an_outcome(train, tiny_model):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    trainer = train(*OURS, reward_funcs=[model, by_letters], rollout_func=spaced_rollout, max_steps=1, **PGR)
    assert list(trainer._logs["extra"]) == ["by_letters/steps"]
    assert 0.0 < logged(trainer)[0]["process/advantage_share"] < 1.0


# Metrics and table


def test_metrics_and_completions_table(train):
    trainer = spy(train)
    rewards, scored, mask = batch_by_hand(trainer)
    entry = logged(trainer)[0]
    count = scored.sum(1).double()
    advantages = trainer.seen["advantages"].double()
    first = torch.stack([row[m.nonzero()[0, 0]] for row, m in zip(advantages, mask, strict=True)])
    assert entry["process/steps_mean"] == pytest.approx(count.mean().item())
    assert entry["process/steps_max"] == count.max().item()
    assert entry["process/step_reward_mean"] == pytest.approx(rewards[scored].mean().item(), abs=1e-6)
    assert entry["process/frac_steps_unscored"] == 0.0
    assert entry["process/frac_groups_zero_std"] == 0.0
    assert entry["process/advantage_share"] == 1.0
    for name, values in (("", first), ("abs_", first.abs())):
        expected = np.corrcoef(count.numpy(), values.numpy())[0, 1]
        assert entry[f"process/steps_{name}advantage_corr"] == pytest.approx(expected, abs=1e-5)
    for j in range(1, int(count.max()) + 1):
        nth = [row[s.nonzero()[j - 1, 0]].item() for row, s in zip(rewards, scored, strict=True) if s.sum() >= j]
        assert entry[f"process/step_reward/{j}"] == pytest.approx(np.mean(nth), abs=1e-6)
    assert "advantages/frac_groups_zero_std" not in entry

    per_row = [row[s].tolist() for row, s in zip(rewards, scored, strict=True)]
    table = list(trainer._logs["extra"]["by_letters/steps"])
    assert [pytest.approx(row, abs=1e-6) for row in per_row] == table
    means = [sum(row) / len(row) for row in per_row]
    assert list(trainer._logs["rewards"]["by_letters"]) == pytest.approx(means, abs=1e-6)
    assert entry["rewards/by_letters/mean"] == pytest.approx(np.mean(means), abs=1e-6)


def test_the_table_of_a_batch_is_written_and_says_nothing_stale(train, tmp_path):
    calls = []

    def sometimes(completions, completion_steps, **kwargs):
        calls.append(1)
        return [None if len(calls) > 1 else [1.0] * len(steps) for steps in completion_steps]

    options = {"log_completions": True, "max_steps": 2}
    trainer = train(*OURS, reward_funcs=[by_letters, sometimes], rollout_func=spaced_rollout, **PGR, **options)
    import pandas

    files = sorted((tmp_path / "out" / "completions").iterdir())
    first, second = (pandas.read_parquet(file) for file in files)
    assert all(value == 1.0 for row in first["sometimes/steps"] for value in row)
    assert all(value is None for row in second["sometimes/steps"] for value in row)
    assert trainer.reward_func_names == ["by_letters", "sometimes"]


# What is refused


def returns(value):
    """A function that returns `value` for the second of four completions, and what is right for the others."""

    def broken(completions, completion_steps, **kwargs):
        return [value if i == 1 else [0.5] * len(steps) for i, steps in enumerate(completion_steps)]

    return broken


COUNT = (
    "Reward function 'broken' returned {n} step rewards for completion 1, which has 1 steps. Return one number per "
    "entry of completion_steps[1], and None for a step that cannot be scored."
)
MIXED = (
    "Reward function 'broken' returned both numbers and lists. Return one number per completion (outcome) or one list "
    "per completion (process)."
)
VALUE = "Reward function 'broken' returned {v} for step 0 of completion 1; a step reward is a finite number or None."
ADDS_UP = (
    "advantage_estimator='{}' would add up the step rewards of a completion and favour many steps. Use "
    "'process_group_relative', 'prime', or return one number (for example the minimum)."
)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ([], {}, COUNT.format(n=0)),
        ([1.0, 2.0, 3.0], {}, COUNT.format(n=3)),
        (1.0, {}, MIXED),
        ([[1.0]], {}, VALUE.format(v="[1.0]")),
        (["1"], {}, VALUE.format(v="'1'")),
        ([float("inf")], {}, VALUE.format(v="inf")),
        ([float("-inf")], {"advantage_estimator": "reinforce"}, VALUE.format(v="-inf")),
        ([np.array([1.0])], {}, VALUE.format(v="[1.0]")),
        *[
            ([0.5], {"advantage_estimator": name}, ADDS_UP.format(name))
            for name in ("group_relative", "group_mean", "leave_one_out", "length_weighted")
        ],
        (
            [0.5],
            {"reward_clip_range": [0.0, 1.0]},
            "reward_clip_range clips the reward of a completion, but every reward function returned step rewards. "
            "Remove it.",
        ),
    ],
)
def test_what_a_function_must_not_return_is_refused_by_name_and_place(train, value, options, message):
    options = {"advantage_estimator": "process_group_relative", **options}
    functions = returns(value) if "reward_clip_range" in options else [digits, returns(value)]
    with pytest.raises(ValueError) as error:
        train(*OURS, reward_funcs=functions, **options)
    assert str(error.value) == message


def test_numbers_only_are_refused_and_too_few_rewards_are_still_trls_error(train):
    with pytest.raises(ValueError) as error:
        train(*OURS, **PGR)
    assert str(error.value) == (
        "advantage_estimator='process_group_relative' needs a reward function that returns one list per completion; "
        "got numbers only."
    )

    def too_few(completions, completion_steps, **kwargs):
        return [[0.0] * len(steps) for steps in completion_steps][:2]

    with pytest.raises(ValueError, match="The reward function 'too_few' returned 2 rewards, but 4 were expected"):
        train(*OURS, reward_funcs=too_few, **PGR)


def test_a_moved_tool_mask_is_an_error_that_names_the_seam(train, monkeypatch):
    original = trl.GRPOTrainer._generate

    class Moved(tuple):
        def __getitem__(self, index):
            return [[1]] if index == 2 else super().__getitem__(index)

    monkeypatch.setattr(trl.GRPOTrainer, "_generate", lambda self, prompts: Moved(original(self, prompts)))
    with pytest.raises(RuntimeError, match="_generate does not return the tool mask third"):
        train(*OURS, reward_funcs=by_letters, rollout_func=spaced_rollout, **PGR)


# It learns


def test_step_rewards_teach_where_a_constant_outcome_teaches_nothing(train):
    def constant(completions, **kwargs):
        return [0.0] * len(completions)

    def share(completions, completion_steps, **kwargs):
        return [[sum(c in LETTERS for c in s) / max(len(s.strip()), 1) for s in steps] for steps in completion_steps]

    def measure(completions, **kwargs):
        seen.append(sum(c in LETTERS for text in completions for c in text) / (sum(map(len, completions)) or 1))
        return constant(completions)

    options = {"max_steps": 50, "per_device_train_batch_size": 16, "num_generations": 8, "learning_rate": 1e-2}
    options |= {"lr_scheduler_type": "constant", "max_completion_length": 16}
    seen = []
    train(*OURS, reward_funcs=[share, measure], **PGR, **options)
    assert 0.2 < seen[0] < 0.55 and seen[-1] > 0.9
    seen = []
    train(*OURS, reward_funcs=measure, advantage_estimator="group_relative", **options)
    assert sum(seen[-10:]) / 10 == pytest.approx(sum(seen[:10]) / 10, abs=0.1)


def reads_no_steps(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_completions_are_not_cut_for_functions_that_read_no_steps(train, monkeypatch):
    monkeypatch.setattr(
        "trl_ext.trainers.grpo.steps.segment", lambda *a: pytest.fail("a completion was cut into steps")
    )
    train(*OURS, advantage_estimator="reinforce_plus_plus", reward_funcs=reads_no_steps, max_steps=1)
