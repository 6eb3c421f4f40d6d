"""
The estimators once more: float64 loops over lists, written from the papers, sharing nothing with the package.

Rows are lists of token rewards, the KL penalty subtracted; `without_kl` are the same rows before that, given where a
penalty was. Returns are their sums, `None` in rows without any reward.
"""

import itertools
import math

NOT_SCORED = None


def equal(values):
    """Whether numbers differ by no more than a millionth of the largest, or of 1."""
    return max(values) - min(values) <= 1e-6 * max(1.0, *(abs(x) for x in values))


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


def group_relative(returns, lengths, size, without_kl=None):
    """§4.1.2 of arXiv 2402.03300; a group whose returns differ by the KL alone is not divided."""
    out = [0.0] * len(returns)
    for _, scored in _groups(returns, size):
        if len(scored) < 2:
            continue
        mean = sum(returns[i] for i in scored) / len(scored)
        std = math.sqrt(sum((returns[i] - mean) ** 2 for i in scored) / (len(scored) - 1))
        kl_alone = without_kl is not None and equal([without_kl[i] for i in scored])
        for i in scored:
            out[i] = (returns[i] - mean) / (1.0 if kl_alone else std + 1e-4)
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


def pass_at_k(returns, lengths, size, without_kl=None, k=2, scale=True):
    """Every set of k attempts written out: what the sets with a row are better than all of them (2508.10751)."""
    out = [0.0] * len(returns)
    for _, scored in _groups(returns, size):
        if len(scored) <= k:
            continue
        sets = list(itertools.combinations(scored, k))
        best = [max(returns[j] for j in members) for members in sets]
        mean = sum(best) / len(best)
        std = math.sqrt(sum((x - mean) ** 2 for x in best) / len(best))
        kl_alone = without_kl is not None and equal([without_kl[i] for i in scored])
        for i in scored:
            own = [x for x, members in zip(best, sets, strict=True) if i in members]
            ahead = sum(own) / len(own) - mean
            if not scale or kl_alone:
                out[i] = ahead
            elif not equal(best):
                out[i] = ahead / std
    return out


def best_of_group(returns, lengths, size, without_kl=None, scale=False):
    """The maximum less the maximum without the row (2503.19595)."""
    out = [0.0] * len(returns)
    for _, scored in _groups(returns, size):
        if len(scored) < 2:
            continue
        values = [returns[i] for i in scored]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
        kl_alone = without_kl is not None and equal([without_kl[i] for i in scored])
        for i in scored:
            ahead = max(values) - max(returns[j] for j in scored if j != i)
            out[i] = ahead if not scale or kl_alone else ahead / std if not equal(values) else 0.0
    return out


def gpg(returns, lengths, size, without_kl=None, correction="groups"):
    """Section "Accurate gradient estimation" of 2504.02546, or as verl counts."""
    out, counted, total = [0.0] * len(returns), 0, 0
    outcomes = returns if without_kl is None else without_kl
    for _, scored in _groups(returns, size):
        total += len(scored)
        if correction == "nonzero":
            counted += sum(returns[i] != 0 for i in scored)
        elif len(scored) > 1 and not equal([outcomes[i] for i in scored]):
            counted += len(scored)
        for i in scored:
            out[i] = returns[i] - sum(returns[j] for j in scored) / len(scored)
    return [x * total / max(counted, 1) for x in out]


def reinforce(rows, masks, scored, gamma=1.0, discount="trainable"):
    """Rows of token rewards to rows of advantages; 0 in rows without any reward."""
    return [
        reward_to_go(row, mask, gamma, discount) if known else [0.0] * len(row)
        for row, mask, known in zip(rows, masks, scored, strict=True)
    ]


def remax(rows, masks, scored, greedy):
    """Algorithm 1 of arXiv 2310.10505, the KL of the tokens to come in the return; `None` in `greedy`: not scored."""
    out = []
    for row, mask, known, baseline in zip(rows, masks, scored, greedy, strict=True):
        compared = known and baseline is not None
        out.append([0.0] * len(row))
        for t in range(len(row)):
            if mask[t] and compared:
                out[-1][t] = sum(r for r, m in zip(row[t:], mask[t:], strict=True) if m) - baseline
    return out


def reinforce_plus_plus(
    rows,
    masks,
    scored,
    without_kl=None,
    weighting="token",
    correction=0,
    norm="whiten",
    gamma=1.0,
    discount="trainable",
):
    """Eq. 4–5 of arXiv 2501.03262 v9."""
    to_go, outcomes = (
        None if rows_ is None else [reward_to_go(r, m, gamma, discount) for r, m in zip(rows_, masks, strict=True)]
        for rows_ in (rows, without_kl)
    )
    return _whitened(to_go, outcomes, masks, scored, weighting, correction, norm)


def reinforce_plus_plus_baseline(
    rows, masks, scored, outcomes, size, without_kl=None, weighting="token", correction=0, norm="whiten"
):
    """Eq. 6–8; `outcomes[i]` is the return of row i without KL."""
    values, unpenalised, compared = [], [], [False] * len(rows)
    for members, _ in _groups(outcomes, size):
        known = [j for j in members if scored[j]]
        mean = sum(outcomes[j] for j in known) / len(known) if known else 0.0
        for i in members:
            compared[i] = scored[i] and len(known) > 1
            values.append([x - mean for x in reward_to_go(rows[i], masks[i])])
            if without_kl is not None:
                unpenalised.append([x - mean for x in reward_to_go(without_kl[i], masks[i])])
    return _whitened(values, None if without_kl is None else unpenalised, masks, compared, weighting, correction, norm)


def _whitened(values, without_kl, masks, used, weighting, correction, norm):
    places = [(i, t) for i, row in enumerate(values) for t in range(len(row)) if used[i] and masks[i][t]]
    if not places:
        return [[0.0] * len(row) for row in values]
    weights = [1.0 if weighting == "token" else 1.0 / sum(masks[i]) for i, _ in places]
    total = sum(weights)
    mean = sum(w * values[i][t] for w, (i, t) in zip(weights, places, strict=True)) / total
    degrees = total - correction if total > correction + 1e-9 else total
    squares = sum(w * (values[i][t] - mean) ** 2 for w, (i, t) in zip(weights, places, strict=True))
    std = math.sqrt(squares / degrees + 1e-8)
    if norm == "center" or (without_kl is not None and equal([without_kl[i][t] for i, t in places])):
        std = 1.0
    out = [[0.0] * len(row) for row in values]
    for i, t in places:
        out[i][t] = (values[i][t] - mean) / std
    return out


def step_advantages(step_rewards, step_ends, masks, size, credit="sum", temperature=0.1):
    """§4.1.3 of arXiv 2402.03300; one prompt, one completion, one token at a time. `None`: a step without reward."""
    advantages = []
    for start in range(0, len(step_rewards), size):
        members = range(start, start + size)
        pool = [r for i in members for r in step_rewards[i] or [] if r is not None]
        mean = sum(pool) / len(pool) if pool else 0.0
        std = math.sqrt(sum((r - mean) ** 2 for r in pool) / (len(pool) - 1)) if len(pool) > 1 else 0.0
        for i in members:
            known = [(e, r) for e, r in zip(step_ends[i], step_rewards[i] or [], strict=False) if r is not None]
            softmax = [math.exp(-r / temperature) for _, r in known] if credit == "softmin" else [1.0] * len(known)
            row = []
            for t, trainable in enumerate(masks[i]):
                later = [
                    ((r - mean) / (std + 1e-4), w / sum(softmax))
                    for (e, r), w in zip(known, softmax, strict=True)
                    if e >= t
                ]
                values = [value for value, _ in later]
                if not trainable or not later:
                    row.append(0.0)
                elif credit == "softmin":
                    row.append(sum(value * weight for value, weight in later))
                else:
                    row.append({"sum": sum(values), "mean": sum(values) / len(values), "min": min(values)}[credit])
            advantages.append(row)
    return advantages


def process_group_relative(
    step_rewards, step_ends, masks, returns, size, process_weight=1.0, outcome_weight=1.0, **options
):
    """The two sources, each on its own scale; and the share of the first in the sum of the sizes, NaN without any."""
    of_steps = step_advantages(step_rewards, step_ends, masks, size, **options)
    of_outcomes = group_relative(returns, None, size)
    total, sizes = [], [0.0, 0.0]
    for row, mask, outcome in zip(of_steps, masks, of_outcomes, strict=True):
        total.append([])
        for x, trainable in zip(row, mask, strict=True):
            parts = process_weight * x, outcome_weight * outcome if trainable else 0.0
            total[-1].append(sum(parts))
            sizes = [size_ + abs(part) for size_, part in zip(sizes, parts, strict=True)]
    return total, sizes[0] / sum(sizes) if sum(sizes) else math.nan


def lambda_advantages(rewards, mask, values, gamma=1.0, lam=0.95):
    """Eq. 11-16 of arXiv 1506.02438, backwards over one row; the last of `values` is that of what comes after it."""
    out, after, running = [0.0] * len(rewards), values[-1], 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            running = rewards[t] + gamma * after - values[t] + gamma * lam * running
            out[t], after = running, values[t]
    return out


def gae(rows, masks, scored, values, without_kl, gamma=1.0, lam=0.95):
    """The same, whitened over all rows; only centred where the reward-to-go without KL is the same everywhere."""
    advantages = [lambda_advantages(*row, gamma, lam) for row in zip(rows, masks, values, strict=True)]
    to_go = [reward_to_go(r, m, gamma) for r, m in zip(without_kl, masks, strict=True)]
    return _whitened(advantages, to_go, masks, scored, "token", 0, "whiten")


def prime(steps, outcomes, masks, size, process_weight=1.0, outcome_weight=1.0):
    """
    Arxiv 2502.01456 as its authors' program does it, source by source. `steps`: rows with `None` for tokens without a
    reward; `outcomes`: numbers, or `None`.
    """
    width = len(masks[0])
    totals = [[0.0] * width for _ in masks]
    at_end = []
    for mask, outcome in zip(masks, outcomes, strict=True):
        last = max((t for t in range(width) if mask[t]), default=0)
        at_end.append([outcome if t == last else None for t in range(width)])
    for source, weight in ((steps, process_weight), (at_end, outcome_weight)):
        for start in range(0, len(masks), size):
            rows = [i for i in range(start, start + size) if any(x is not None for x in source[i])]
            n = len(rows)
            if n < 2:
                continue
            known = [[x for x in source[i] if x is not None] for i in rows]
            baseline = sum(sum(row) / len(row) for row in known) / (n - 1)
            for i in rows:
                for t, x in enumerate(source[i]):
                    if x is not None:
                        totals[i][t] += weight * (x * n / (n - 1) - baseline)
    scored = [o is not None or any(x is not None for x in row) for o, row in zip(outcomes, steps, strict=True)]
    learns = [[bool(m) and s for m in mask] for mask, s in zip(masks, scored, strict=True)]
    to_go = [reward_to_go(row, mask) for row, mask in zip(totals, learns, strict=True)]
    values = [x for row, mask in zip(to_go, learns, strict=True) for x, m in zip(row, mask, strict=True) if m]
    if not values:
        return [[0.0] * width for _ in masks]
    mean = sum(values) / len(values)
    degrees = len(values) - 1 if len(values) > 1 else len(values)
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / degrees + 1e-8)
    return [
        [(x - mean) / std if m else 0.0 for x, m in zip(row, mask, strict=True)]
        for row, mask in zip(to_go, learns, strict=True)
    ]
