"""The estimators once more: float64 loops over lists, written from the papers, sharing nothing with the package."""

import math

NOT_SCORED = None


def reward_to_go(rewards, mask, gamma=1.0, discount="trainable"):
    """Backwards over one row. Untrainable tokens pass the running sum on, discounted only with `discount="all"`."""
    running, out = 0.0, [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        if mask[t]:
            running = rewards[t] + gamma * running
            out[t] = running
        elif discount == "all":
            running *= gamma
    return out


def _groups(returns, size):
    for start in range(0, len(returns), size):
        rows = range(start, start + size)
        yield rows, [i for i in rows if returns[i] is not NOT_SCORED]


def group_relative(returns, lengths, size):
    out = [0.0] * len(returns)
    for _, scored in _groups(returns, size):
        if len(scored) < 2:
            continue
        mean = sum(returns[i] for i in scored) / len(scored)
        std = math.sqrt(sum((returns[i] - mean) ** 2 for i in scored) / (len(scored) - 1))
        for i in scored:
            out[i] = (returns[i] - mean) / (std + 1e-4)
    return out


def group_mean(returns, lengths, size):
    out = [0.0] * len(returns)
    for _, scored in _groups(returns, size):
        for i in scored:
            out[i] = returns[i] - sum(returns[j] for j in scored) / len(scored)
    return out


def leave_one_out(returns, lengths, size):
    out = [0.0] * len(returns)
    for _, scored in _groups(returns, size):
        for i in scored:
            others = [returns[j] for j in scored if j != i]
            out[i] = returns[i] - sum(others) / len(others) if others else 0.0
    return out


def length_weighted(returns, lengths, size):
    out = [0.0] * len(returns)
    for _, scored in _groups(returns, size):
        tokens = sum(lengths[j] for j in scored)
        for i in scored:
            out[i] = returns[i] - sum(lengths[j] * returns[j] for j in scored) / tokens
    return out


def reinforce_plus_plus(rows, masks, scored, weighting="token", correction=0, gamma=1.0, discount="trainable"):
    """Rows of token rewards to rows of advantages, Eq. 4–5 of arXiv 2501.03262 v9."""
    to_go = [reward_to_go(r, m, gamma, discount) for r, m in zip(rows, masks, strict=True)]
    return _whitened(to_go, masks, scored, weighting, correction)


def reinforce_plus_plus_baseline(rows, masks, scored, outcomes, size, weighting="token", correction=0):
    """Eq. 6–8; `outcomes[i]` is the return of row i without KL."""
    values, compared = [], [False] * len(rows)
    for members, _ in _groups(outcomes, size):
        known = [j for j in members if scored[j]]
        mean = sum(outcomes[j] for j in known) / len(known) if known else 0.0
        for i in members:
            compared[i] = scored[i] and len(known) > 1
            values.append([x - mean for x in reward_to_go(rows[i], masks[i])])
    return _whitened(values, masks, compared, weighting, correction)


def _whitened(values, masks, used, weighting, correction):
    entries = []
    for i, row in enumerate(values):
        tokens = sum(masks[i])
        for t, x in enumerate(row):
            if used[i] and masks[i][t]:
                entries.append((x, 1.0 if weighting == "token" else 1.0 / tokens))
    if not entries:
        return [[0.0] * len(row) for row in values]
    total = sum(w for _, w in entries)
    mean = sum(w * x for x, w in entries) / total
    degrees = total - correction if total > correction + 1e-9 else total
    std = math.sqrt(sum(w * (x - mean) ** 2 for x, w in entries) / degrees + 1e-8)
    return [
        [(x - mean) / std if used[i] and masks[i][t] else 0.0 for t, x in enumerate(row)]
        for i, row in enumerate(values)
    ]
