"""Process rewards: the paper's formula as worked numbers, as a float64 loop, and as laws."""

import math
import warnings

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theorems import proves

from trl_ext.functional.advantages import ADVANTAGE_ESTIMATORS, group_relative, process_group_relative
from trl_ext.functional.process_rewards import step_advantages
from trl_ext.functional.rewards import RewardBatch, reward_at_end

F64 = torch.float64
NAN = float("nan")
CREDITS = ["sum", "mean", "min", "softmin"]
VECTOR_A = [[0.2, 0.9, 0.4], [0.5, 0.1], [0.8, 0.8, 0.6, 0.3]]


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def on_tokens(step_rewards, step_ends, masks):
    """`rewards`, `scored` and `mask` in float64, whose values are not rounded to float32 first."""
    mask = torch.tensor(masks)
    rewards, scored = torch.zeros(mask.shape, dtype=F64), torch.zeros(mask.shape, dtype=torch.bool)
    for row, (values, ends) in enumerate(zip(step_rewards, step_ends, strict=True)):
        for value, end in zip(values or [], ends, strict=False):
            if value is not None:
                rewards[row, end], scored[row, end] = value, True
    return rewards, scored, mask


def one_token_per_step(step_rewards, lengths=None):
    """Every step is one token; rows are padded."""
    lengths = lengths or [len(row) for row in step_rewards]
    ends = [list(range(length)) for length in lengths]
    masks = [[1] * length + [0] * (max(lengths) - length) for length in lengths]
    return on_tokens(step_rewards, ends, masks)


def mixed(steps, size, returns=None, **fields):
    """A batch of `rewards`, `scored` and `mask` of steps, and of outcomes if there are any."""
    rewards, scored, mask = steps
    returns = [NAN] * len(mask) if returns is None else returns
    outcome, outcome_scored = reward_at_end(torch.as_tensor(returns, dtype=rewards.dtype), mask)
    return RewardBatch(outcome, outcome_scored, mask, size, rewards, scored, **fields)


def both(steps, size, returns=None, **options):
    return process_group_relative(mixed(steps, size, returns), **options)


# Numbers worked by hand


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[-0.117, 0.975001, -0.39], [-1.482001, -1.443001], [1.599001, 0.585, -0.429, -0.741]]),
        ({"credit": "mean"}, [[-0.039, 0.4875, -0.39], [-0.741, -1.443001], [0.39975, 0.195, -0.2145, -0.741]]),
        ({"credit": "min"}, [[-1.092001, -0.39, -0.39], [-1.443001, -1.443001], [-0.741] * 4]),
        (
            {"credit": "softmin", "temperature": 0.1},
            [
                [-1.006415, -0.045356, -0.046452],
                [-1.417748, -1.417047],
                [-0.669451, -0.675877, -0.682302, -0.696912],
            ],
        ),
    ],
)
def test_three_siblings_of_three_two_and_four_steps(options, expected):
    advantages = step_advantages(*one_token_per_step(VECTOR_A), 3, **options)
    for row, values in zip(advantages, expected, strict=True):
        close(row, values + [0.0] * (4 - len(values)))


def test_the_papers_normalised_rewards_are_those_without_the_small_number_in_the_denominator():
    # Large rewards, against which 1e-4 vanishes.
    scaled = [[1e6 * value for value in row] for row in VECTOR_A]
    advantages = step_advantages(*one_token_per_step(scaled), 3)
    close(advantages[0, :3], [-0.117041, 0.975343, -0.390137])


def test_the_advantages_of_a_group_do_not_sum_to_zero():
    advantages = step_advantages(*one_token_per_step(VECTOR_A), 3)
    close(advantages[:, 0], [-0.117, -1.482001, 1.599001])
    close(advantages.sum(), -1.443001)


def test_steps_of_several_tokens():
    batch = on_tokens([[1, 0, 1, 1], [0, 1]], [[1, 3, 5, 7], [2, 5]], [[1] * 8, [1] * 6 + [0] * 2])
    expected = [
        [0.645372, 0.645372, 0, 0, 1.290744, 1.290744, 0.645372, 0.645372],
        [-0.645372] * 3 + [0.645372] * 3 + [0, 0],
    ]
    close(step_advantages(*batch, 2), expected)


def test_tool_output_gets_nothing_and_separates_nothing():
    batch = on_tokens([[1, 0.5, 0], [0, 0.5]], [[2, 5, 8], [1, 4]], [[1, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 5 + [0] * 4])
    expected = [[0.716966] * 3 + [0, 0, -0.716966] + [-0.955954] * 3, [-0.716966] * 2 + [0.238989] * 3 + [0] * 4]
    close(step_advantages(*batch, 2), expected)


def test_a_step_that_was_not_scored_is_dropped_and_does_not_count_as_zero():
    batch = one_token_per_step([[0.2, None, 0.4], [0.5, 0.1], None], lengths=[3, 2, 3])
    expected = [[0, 0.547423, 0.547423], [0, -1.094845, 0], [0, 0, 0]]
    close(step_advantages(*batch, 3), expected)


def test_one_step_each_is_group_relative():
    close(step_advantages(*one_token_per_step([[1], [0], [0], [0]]), 4)[:, 0], [1.4997] + [-0.4999] * 3, 5e-5)


@pytest.mark.parametrize(
    ("credit", "expected"), [("sum", [1.15, 1.73, 2.58, 3.79]), ("mean", [1.15, 0.87, 0.65, 0.47])]
)
def test_with_the_sum_equally_good_answers_gain_by_having_more_steps(credit, expected):
    first = []
    for steps in (1, 2, 4, 8):
        batch = one_token_per_step([[0.9] * steps, [0.1] * 2])
        first.append(step_advantages(*batch, 2, credit=credit)[0, 0])
    close(torch.stack(first), expected, atol=0.0051)


# The loop written from the paper


@st.composite
def batches(draw):
    size, prompts, width = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 10))
    rows, ends, masks = [], [], []
    for _ in range(size * prompts):
        mask = draw(st.lists(st.integers(0, 1), min_size=width, max_size=width))
        places = sorted(draw(st.sets(st.integers(0, width - 1), max_size=5)))
        value = st.none() | st.floats(-1, 1, allow_nan=False, width=32)
        rows.append([draw(value) for _ in places])
        ends.append(places)
        masks.append(mask)
    return rows, ends, masks, size


@pytest.mark.parametrize("credit", CREDITS)
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_it_is_the_loop(credit, batch):
    rows, ends, masks, size = batch
    tensors = on_tokens(rows, ends, masks)
    before = [tensor.clone() for tensor in tensors]
    actual = step_advantages(*tensors, size, credit=credit)
    # Values up to 5 normalised rewards; equal rewards divide rounding errors by 1e-4.
    close(actual, reference.step_advantages(rows, ends, masks, size, credit), atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "inputs are left as they were"


# Laws


def random_batch(seed, size=3, prompts=2, width=9):
    rng = torch.Generator().manual_seed(seed)
    scored = torch.rand(size * prompts, width, generator=rng) < 0.4
    rewards = torch.rand(scored.shape, generator=rng, dtype=F64).where(scored, 0.0)
    return rewards, scored, (torch.rand(scored.shape, generator=rng) < 0.8).long()


@pytest.mark.parametrize("credit", CREDITS)
def test_padding_and_the_order_of_siblings_and_prompts_change_nothing(credit):
    rewards, scored, mask = random_batch(0)
    expected = step_advantages(rewards, scored, mask, 3, credit=credit)
    padded = [torch.nn.functional.pad(x, (0, 4)) for x in (rewards, scored, mask)]
    close(step_advantages(*padded, 3, credit=credit), torch.nn.functional.pad(expected, (0, 4)), 1e-12)
    for order in ([2, 0, 1, 3, 4, 5], [3, 4, 5, 0, 1, 2]):
        permuted = [x[order] for x in (rewards, scored, mask)]
        close(step_advantages(*permuted, 3, credit=credit), expected[order], 1e-12)


@pytest.mark.parametrize("credit", CREDITS)
def test_scale_and_shift_of_the_rewards_matter_for_softmin_only(credit):
    rewards, scored, mask = random_batch(1)
    changed = (1000.0 * rewards + 7.0).where(scored, 0.0)
    options = {"credit": credit}
    before = step_advantages(1000 * rewards, scored, mask, 3, **options)
    after = step_advantages(changed, scored, mask, 3, **options)
    close(after, before, 1e-9)  # a shift matters for none
    scaled = step_advantages(2000 * rewards, scored, mask, 3, **options)
    rescaled = step_advantages(rewards, scored, mask, 3, **options)
    assert torch.allclose(scaled, rescaled, atol=5e-3) == (credit != "softmin")


@pytest.mark.theorem(
    "Advantages",
    "One step per completion, ending at its last token: process supervision is `group_relative`",
    paper="deepseekmath",
    at_most=0,
)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_one_step_on_the_last_token_is_group_relative_bit_for_bit(data):
    rows = data.draw(st.integers(1, 3)) * 4
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows)))
    values = st.floats(-3, 3, width=32) | st.just(math.nan)
    returns = torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows)), dtype=F64)
    returns[0] = 0.25
    mask = (torch.arange(9) < lengths[:, None]).long()
    rewards, scored = reward_at_end(returns, mask)
    expected = group_relative(RewardBatch(rewards, scored, mask, 4))[:, None] * mask
    for credit in ("sum", "mean", "min"):
        proves(step_advantages(rewards, scored, mask, 4, credit=credit), expected)


def test_groups_without_contrast_and_completions_without_steps_get_nothing():
    equal = step_advantages(*one_token_per_step([[0.25, 0.25], [0.25]]), 2)
    single = step_advantages(*one_token_per_step([[0.7, None], [None]]), 2)
    assert not equal.any() and not single.any()
    rewards, scored, mask = random_batch(2)
    scored[1], rewards[1] = False, 0.0
    with_silent = step_advantages(rewards, scored, mask, 3)
    assert not with_silent[1].any()
    others = [x[[0, 2]] for x in (rewards, scored, mask)]
    close(with_silent[[0, 2]], step_advantages(*others, 2), 1e-12)


def test_steps_of_a_masked_completion_count_in_the_statistics():
    rewards, scored, mask = one_token_per_step([[1.0, 1.0], [0.0, 0.5]])
    masked = mask.clone()
    masked[1] = 0
    advantages = step_advantages(rewards, scored, masked, 2)
    assert torch.equal(advantages[0], step_advantages(rewards, scored, mask, 2)[0])
    assert not advantages[1].any()


def test_nothing_to_learn_from_is_said_once_and_gives_zeros():
    for scored, mask in ((torch.zeros(2, 3), torch.ones(2, 3)), (torch.ones(2, 3), torch.zeros(2, 3))):
        with pytest.warns(UserWarning, match="No completion of the batch has both a reward and a trainable") as caught:
            advantages = process_group_relative(mixed((torch.rand(2, 3).where(scored > 0, 0.0), scored > 0, mask), 2))
        assert len(caught) == 1 and not advantages.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit": "max"}, "credit must be 'sum', 'mean', 'min' or 'softmin', got 'max'."),
        ({"credit": "softmin", "temperature": 0.0}, "temperature must be a positive number, got 0.0."),
        ({"credit": "softmin", "temperature": "low"}, "temperature must be a positive number, got 'low'."),
        ({"temperature": 0.5}, "temperature is read only with credit='softmin', got credit='sum'. Remove it."),
    ],
)
def test_other_options_are_refused(options, message):
    batch = one_token_per_step(VECTOR_A)
    for refused in (lambda: step_advantages(*batch, 3, **options), lambda: both(batch, 3, **options)):
        with pytest.raises(ValueError) as error:
            refused()
        assert str(error.value) == message


@pytest.mark.theorem(
    "Advantages",
    "A ratio of whole sequences has the gradient of the mean advantage: credit for single tokens is lost",
    at_most=1e-12,
)
def test_the_gradient_of_a_sequence_ratio_is_that_of_the_mean_advantage():
    # Why importance_sampling_level='sequence' is refused: the ratio's log is the mean of the log-probs.
    advantages = step_advantages(*one_token_per_step([[1, 0, 1, 1], [0, 1, 1, 0]]), 2)
    gradients = []
    for values in (advantages, advantages.mean(1, keepdim=True).expand(2, 4)):
        logps = torch.zeros(2, 4, dtype=F64, requires_grad=True)
        ratio = (logps - logps.detach()).mean(1, keepdim=True).exp()
        (ratio * values).mean(1).sum().backward()
        gradients.append(logps.grad)
    proves(*gradients)
    assert advantages.std(1).min() > 0.1


# Steps and outcomes together


def test_steps_without_outcomes_are_the_papers():
    batch = one_token_per_step(VECTOR_A)
    for credit in CREDITS:
        assert torch.equal(both(batch, 3, credit=credit), step_advantages(*batch, 3, credit=credit))
    close(both(batch, 3, process_weight=0.5), 0.5 * step_advantages(*batch, 3))


# Vector A beside the outcomes 1, 0, 1: mean 2/3, Bessel's deviation 1/sqrt(3) = .577350.
OUTCOMES = [1.0, 0.0, 1.0]
OF_OUTCOMES = [0.577250, -1.154501, 0.577250]
OF_STEPS = [[-0.117, 0.975001, -0.39], [-1.482001, -1.443001], [1.599001, 0.585, -0.429, -0.741]]


@pytest.mark.parametrize(("process", "outcome"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0), (-1.0, 0.25)])
def test_each_source_is_normalised_for_itself_and_then_weighted(process, outcome):
    advantages = both(one_token_per_step(VECTOR_A), 3, OUTCOMES, process_weight=process, outcome_weight=outcome)
    for row, steps, whole in zip(advantages, OF_STEPS, OF_OUTCOMES, strict=True):
        close(row, [process * x + outcome * whole for x in steps] + [0.0] * (4 - len(steps)), 5e-6)


def test_a_completion_may_lack_either_source():
    batch = one_token_per_step([[1.0], [0.0], [None], [None]])
    # Steps 1, 0: ±.707007; outcomes of the rows 0, 2: ±.707007.
    close(both(batch, 4, [1.0, NAN, 0.0, NAN])[:, 0], [1.414014, -0.707007, -0.707007, 0.0], 2e-6)


def test_the_scale_of_one_source_leaves_the_other_alone():
    rewards, scored, mask = random_batch(3)
    returns = torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0, 2.0], dtype=F64)
    loud = both((1000 * rewards, scored, mask), 3, returns) - both((1000 * rewards, scored, mask), 3)
    close(loud, both((rewards, scored, mask), 3, returns) - both((rewards, scored, mask), 3), 1e-9)


def test_a_mask_of_any_nonzero_numbers_means_the_same():
    rewards, scored, mask = random_batch(4)
    returns = torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0, 2.0], dtype=F64)
    expected = both((rewards, scored, mask), 3, returns)
    for other in (mask.bool(), 2 * mask, 0.5 * mask):
        assert torch.equal(both((rewards, scored, other), 3, returns), expected)


def test_an_outcome_without_token_beside_steps_that_teach_is_no_cause_for_a_warning():
    rewards, scored, mask = one_token_per_step([[1.0, 0.0], [0.0, 0.5], None], lengths=[2, 2, 0])
    row = ADVANTAGE_ESTIMATORS["process_group_relative"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = mixed((rewards, scored, mask), 3, [NAN, NAN, 1.0])
        advantages = process_group_relative(batch)
        metrics = row.metrics(batch, advantages)
    close(advantages, step_advantages(rewards, scored, mask, 3))
    assert metrics == {"process/advantage_share": 1.0}


def test_a_kl_penalty_and_missing_steps_are_refused():
    batch = one_token_per_step(VECTOR_A)
    with pytest.raises(ValueError) as error:
        process_group_relative(mixed(batch, 3, kl_penalty=torch.zeros(3, 4)))
    assert str(error.value) == (
        "process_group_relative takes no kl_penalty, which belongs to no step. Put it into the loss."
    )
    with pytest.raises(ValueError) as error:
        process_group_relative(mixed(batch, 3, OUTCOMES).outcomes_alone())
    assert str(error.value) == "process_group_relative needs step rewards; set steps and steps_scored of the batch."


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_sources_in_another_dtype_are_those_of_float64_rounded_once(dtype):
    rewards, scored, mask = random_batch(5)
    returns = torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0, 2.0])
    # The steps are finer than the dtype of the outcome, whose dtype the result has.
    outcome, outcome_scored = reward_at_end(returns.to(dtype), mask)
    batch = RewardBatch(outcome, outcome_scored, mask, 3, rewards, scored)
    exact = RewardBatch(outcome.double(), outcome_scored, mask, 3, rewards, scored)
    options = {"process_weight": 0.3, "outcome_weight": 0.7}
    advantages = process_group_relative(batch, **options)
    assert advantages.dtype == dtype
    assert torch.equal(advantages, process_group_relative(exact, **options).to(dtype))
