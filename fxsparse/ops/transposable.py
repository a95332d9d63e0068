"""Binary m x m blocks whose rows and columns all sum to n, of a high total score: masks that are N:M both ways.

Finding the best one is a transportation problem. For m <= 4 all valid blocks are tried; there are 90 for 2:4. For
larger m, over all blocks at once:

1. take entries from the highest score on while their row and their column have room (greedy);
2. complete rows and columns that this left short, each time by the exchange that costs least;
3. trade two kept entries (i, a), (k, b) for (i, b), (k, a), the best pair first, until none gains.

The result is always valid and a local optimum of the last step, not always the best block.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

_EXACT = 4  # largest m whose blocks are enumerated
_CHUNK = 1 << 24  # elements of a temporary while blocks are searched


def transposable_blocks(scores: Tensor, n: int) -> Tensor:
    """A mask, bool ``[blocks, m, m]``, for every block of scores ``[blocks, m, m]``: n True a row and a column.

    NaN and infinite scores count as the largest or smallest finite ones.
    """
    m = scores.shape[-1]
    if not len(scores):
        return torch.zeros_like(scores, dtype=torch.bool)
    if not scores.is_floating_point() or scores.dtype.itemsize < 4:
        scores = scores.float()
    limit = torch.finfo(scores.dtype).max / (4 * m * m)  # the total of a block stays finite
    scores = scores.nan_to_num(nan=limit).clamp(-limit, limit)
    search, temporary = (_best, len(valid_blocks(n, m)) + m * m) if m <= _EXACT else (_good, m**3)
    return torch.cat([search(chunk, n) for chunk in scores.split(max(1, _CHUNK // temporary))])


@functools.cache
def valid_blocks(n: int, m: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Every m x m block whose rows and columns sum to n; those that keep lower indices come first."""
    rows = [tuple(int(i in kept) for i in range(m)) for kept in itertools.combinations(range(m), n)]
    blocks = itertools.product(rows, repeat=m)
    return tuple(block for block in blocks if all(sum(column) == n for column in zip(*block, strict=True)))


def _best(scores: Tensor, n: int) -> Tensor:
    candidates = torch.tensor(valid_blocks(n, scores.shape[-1]), device=scores.device)
    totals = scores.flatten(1) @ candidates.flatten(1).t().to(scores.dtype)
    return candidates.bool()[totals.argmax(-1)]


def _good(scores: Tensor, n: int) -> Tensor:
    mask = _greedy(scores, n)
    _complete(mask, scores, n)
    _exchange(mask, scores)
    return mask


def _greedy(scores: Tensor, n: int) -> Tensor:
    count, m, _ = scores.shape
    block = torch.arange(count, device=scores.device)
    order = scores.flatten(1).sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    row_room = torch.full((count, m), n, device=scores.device)
    column_room = row_room.clone()
    for entry in order.unbind(1):
        row, column = entry // m, entry % m
        free = (row_room[block, row] > 0) & (column_room[block, column] > 0)
        mask[block, row, column] = free
        row_room[block, row] -= free.long()
        column_room[block, column] -= free.long()
    return mask


def _complete(mask: Tensor, scores: Tensor, n: int) -> None:
    """Fills rows and columns that are short of n, in place.

    After the greedy pass a short row i and a short column j always keep (i, j) already. Giving up some kept (k, b) for
    (i, b) and (k, j) fills both and leaves row k and column b as full as they were. There is one to give up: a row that
    does not keep column j is full, and row i keeps fewer than n columns, j among them.
    """
    m = mask.shape[-1]
    while True:
        row_lacks, column_lacks = mask.sum(2) < n, mask.sum(1) < n
        short = row_lacks.any(1).nonzero().squeeze(1)
        if not len(short):
            return
        i, j = row_lacks[short].int().argmax(1), column_lacks[short].int().argmax(1)
        block, kept, score = torch.arange(len(short), device=mask.device), mask[short], scores[short]
        gain = score[block, i].unsqueeze(1) + score[block, :, j].unsqueeze(2) - score
        taken = kept[block, i].unsqueeze(1) | kept[block, :, j].unsqueeze(2)
        best = gain.masked_fill(~kept | taken, -math.inf).flatten(1).argmax(1)
        k, b = best // m, best % m
        mask[short, k, b] = False
        mask[short, i, b] = True
        mask[short, k, j] = True


def _exchange(mask: Tensor, scores: Tensor) -> None:
    """Makes the best trade of every block until none gains, in place."""
    m = mask.shape[-1]
    active = torch.arange(len(mask), device=mask.device)
    tolerance = 1e-6 * scores.abs().amax((1, 2))  # what gains by rounding alone could be traded back and forth
    while len(active):
        kept, score = mask[active], scores[active]
        difference = score.unsqueeze(2) - score.unsqueeze(1)  # [blocks, i, k, column]
        only_i = kept.unsqueeze(2) & ~kept.unsqueeze(1)
        lost, a = difference.masked_fill(~only_i, math.inf).min(3)
        won, b = difference.masked_fill(~only_i.transpose(1, 2), -math.inf).max(3)
        gain, pair = (won - lost).flatten(1).max(1)
        better = gain > tolerance[active]
        active, pair = active[better], pair[better]
        i, k = pair // m, pair % m
        a, b = (column.flatten(1)[better].gather(1, pair.unsqueeze(1)).squeeze(1) for column in (a, b))
        mask[active, i, a] = False
        mask[active, k, b] = False
        mask[active, i, b] = True
        mask[active, k, a] = True
