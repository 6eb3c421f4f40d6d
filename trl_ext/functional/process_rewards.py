"""
Process rewards: one number per reasoning step, turned into one advantage per token.

A step's reward sits on the last token of the step. A step that was not scored is absent: from mean, standard
deviation, count and sums.

Symbols: \\(r_{i,j}\\) reward of step \\(j\\) of completion \\(i\\), \\(\\mathrm{index}(j)\\) its last token,
\\(G\\) `num_generations`.
"""

import torch


def _from_the_end(values: torch.Tensor) -> torch.Tensor:
    """Sum of each entry and those after it in its row."""
    return values.flip(1).cumsum(1).flip(1)


def _remaining_credit(
    normalised: torch.Tensor, raw: torch.Tensor, valid: torch.Tensor, credit: str, temperature: float
) -> torch.Tensor:
    """C of the steps from each step on, `(N, S)`; 0 behind the last one. Steps of a row stand side by side."""
    if credit == "sum":
        return _from_the_end(normalised)
    if credit == "mean":
        return _from_the_end(normalised) / _from_the_end(valid.to(normalised)).clamp(min=1.0)
    if credit == "min":
        lowest = normalised.masked_fill(~valid, torch.inf).flip(1).cummin(1).values.flip(1)
        return lowest.where(valid, 0.0)
    weights = (-raw / temperature).masked_fill(~valid, -torch.inf).softmax(1).where(valid, 0.0)
    return _from_the_end(weights * normalised)


def step_advantages(
    rewards: torch.Tensor,
    scored: torch.Tensor,
    mask: torch.Tensor,
    num_generations: int,
    *,
    credit: str = "sum",
    temperature: float = 0.1,
) -> torch.Tensor:
    r"""
    Step rewards relative to all steps of the siblings, summed from each token on (GRPO's process supervision).

    $$ \tilde r_{i,j} = \frac{r_{i,j} - \mathrm{mean}_g(r)}{\mathrm{std}_g(r) + 10^{-4}},\qquad
       A_{i,t} = m_{i,t}\,C\big(\{\tilde r_{i,j} : \mathrm{index}(j) \ge t\}\big) $$

    Shao et al., 2024, §4.1.3 (https://huggingface.co/papers/2402.03300), where \\(C\\) is the sum. Mean and standard
    deviation run over the scored steps of all completions of the prompt, pooled; the standard deviation is Bessel's,
    with the eps of TRL. A token is credited with its own step and the later ones, a token after the last scored step
    with nothing. With one step per completion that ends on its last token it equals `group_relative`.

    The advantages of a group do not sum to 0, and with `"sum"` they grow with the number of remaining steps. A group
    with fewer than two scored steps, or with equal ones, gets 0; a completion without scored step gets 0 and has no
    influence on its siblings. Steps whose tokens are all untrainable (a masked truncated completion) still enter mean
    and standard deviation.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`):
            Step rewards, each on the last token of its step.
        scored (`torch.Tensor` of shape `(N, T)`, bool):
            The tokens that hold a step reward.
        mask (`torch.Tensor` of shape `(N, T)`):
            Nonzero for trainable tokens.
        num_generations (`int`):
            Completions per prompt.
        credit (`str`, *optional*, defaults to `"sum"`):
            \\(C\\), over the remaining scored steps: `"sum"` (the paper), `"mean"`, `"min"`, or `"softmin"`:
            \\(\sum_j w_j\tilde r_{i,j}\\) with \\(w = \mathrm{softmax}_j(-r_{i,j}/\tau)\\) over *all* scored steps of
            the completion, from the rewards before normalisation (PURE, Cheng et al., 2025,
            https://huggingface.co/papers/2504.15275).
        temperature (`float`, *optional*, defaults to `0.1`):
            \\(\tau\\) of `"softmin"`, in the unit of the rewards; PURE's 0.1 is made for rewards in [−1, 1]. Positive.

    Returns:
        `torch.Tensor` of shape `(N, T)`: Dimensionless advantages, in the dtype of `rewards`.

    Raises:
        `ValueError`: If `credit` or `temperature` is outside the values above, or `temperature` is not read.

    Example:

    >>> rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> step_advantages(rewards, torch.ones(2, 2).bool(), torch.ones(2, 2), 2, credit="min")
    tensor([[-0.4999, -0.4999],
            [-0.4999, -0.4999]])
    """
    if credit not in ("sum", "mean", "min", "softmin"):
        raise ValueError(f"credit must be 'sum', 'mean', 'min' or 'softmin', got {credit!r}.")
    if not (isinstance(temperature, int | float) and 0.0 < temperature < float("inf")):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}.")
    if credit != "softmin" and temperature != 0.1:
        raise ValueError(f"temperature is read only with credit='softmin', got credit={credit!r}. Remove it.")

    raw, valid = _side_by_side(rewards.double(), scored)
    groups, pooled = raw.view(-1, num_generations * raw.size(1)), valid.view(-1, num_generations * raw.size(1))
    count = pooled.sum(1, keepdim=True)
    mean = groups.sum(1, keepdim=True) / count.clamp(min=1)
    centred = (groups - mean).where(pooled, 0.0)
    scale = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4
    steps = _remaining_credit((centred / scale).view_as(raw), raw, valid, credit, temperature)

    # The first step that has not ended before token t; one column of zeros for the tokens after the last step.
    remaining = scored.cumsum(1) - scored.long()
    return torch.nn.functional.pad(steps, (0, 1)).gather(1, remaining).where(mask.bool(), 0.0).to(rewards.dtype)


def _side_by_side(rewards: torch.Tensor, scored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scored entries of each row without the gaps between them: values (0 elsewhere) and validity, `(N, S)`."""
    count = scored.sum(1, keepdim=True)
    valid = torch.arange(max(1, int(count.max())), device=scored.device) < count
    values = torch.zeros(valid.shape, dtype=rewards.dtype, device=rewards.device)
    values[valid] = rewards[scored]
    return values, valid


def implicit_reward_loss(
    log_ratios: torch.Tensor, mask: torch.Tensor, success: torch.Tensor, beta: float
) -> torch.Tensor:
    r"""
    Loss that makes a language model an implicit process-reward model: the sum of its token rewards tells success.

    $$ r_{i,t} = \beta\,\log\frac{\pi_\varphi(y_{i,t})}{\pi_{\mathrm{ref}}(y_{i,t})},\qquad
       \ell_i = -s_i\log\sigma\Big(\sum_t r_{i,t}\Big) - (1-s_i)\log\sigma\Big(-\sum_t r_{i,t}\Big) $$

    Cui et al., 2025, Eq. 5 (PRIME, https://huggingface.co/papers/2502.01456).

    Args:
        log_ratios (`torch.Tensor` of shape `(N, T)`):
            \\(\log\pi_\varphi - \log\pi_{\mathrm{ref}}\\) of the sampled tokens, in nats, finite under the mask.
        mask (`torch.Tensor` of shape `(N, T)`):
            Nonzero for trainable tokens.
        success (`torch.Tensor` of shape `(N,)`):
            \\(s_i\\), 1 for a right completion, 0 for a wrong one.
        beta (`float`):
            \\(\beta\\), the unit of the reward per nat.

    Returns:
        `torch.Tensor` of shape `(N,)`: Loss of each completion, in nats.

    Example:

    >>> implicit_reward_loss(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), beta=0.05)
    tensor([0.6931])
    """
    logits = beta * log_ratios.where(mask.bool(), 0.0).sum(1)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, success.to(logits), reduction="none")
