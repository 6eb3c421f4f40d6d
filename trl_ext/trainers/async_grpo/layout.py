"""Trained tokens of a micro-batch: TRL's flat order, and one row for each sample."""

import torch


class Layout:
    """
    Where the trained tokens of one micro-batch of this process are.

    TRL keeps one entry per sample and trained token, `(1, M)`, in the order of the samples, padded at the end where
    another process has more. A token that samples share is forwarded once and is an entry of each.

    Args:
        batch (`dict[str, torch.Tensor]`):
            What TRL's collator made: `token_index` is −1 at padding, `segment_id` is the sample.
    """

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.selected = batch["token_index"] >= 0  # padding is 0 elsewhere: no value tells it
        self._row = batch["segment_id"][self.selected]
        count = torch.bincount(self._row)
        start = count.cumsum(0) - count
        self._column = torch.arange(len(self._row), device=count.device) - start[self._row]
        self.shape = len(count), int(count.max())
        self.mask = torch.arange(self.shape[1], device=count.device) < count[:, None]  # (samples, T)

    def dense(self, flat: torch.Tensor) -> torch.Tensor:
        """`(1, M)`, or the `(m,)` entries that are no padding, as `(samples, T)`, 0 behind a row's last token."""
        dense = flat.new_zeros(self.shape)
        dense[self._row, self._column] = flat[self.selected] if flat.dim() == 2 else flat
        return dense

    def flat(self, dense: torch.Tensor) -> torch.Tensor:
        """`(samples, T)`, or wider, as `(1, M)`, 0 at padding."""
        flat = dense.new_zeros(self.selected.shape)
        flat[self.selected] = dense[self._row, self._column]
        return flat
