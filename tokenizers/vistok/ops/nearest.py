"""The codes nearest to each row, tile by tile."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vistok.ops.tile import check_metric, half_norms, in_float32, pad_rows, product, slices, tile_shape, with_bias

# Codes whose largest score is noted together. The search for the index within a group costs next to nothing, whereas
# a reduction that carries indices through all scores costs ten times one that does not.
GROUP = 32


def nearest_code(
    rows: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], metric: str = "euclidean"
) -> Int[Tensor, " n"]:
    """Index of the code nearest to each row; ties go to the lowest index.

    The n x k matrix is never held: memory is O((n + k) d) plus one tile. The index of a row does not depend on the
    other rows.

    Args:
        rows: float32. Rows that hold NaN get index 0.
        codebook: float32 table.
        metric: ``euclidean`` for the smallest distance, ``dot`` for the largest inner product.
    """
    return nearest_codes(rows, codebook, 1, metric).squeeze(-1)


def nearest_codes(
    rows: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], count: int, metric: str = "euclidean"
) -> Int[Tensor, "n count"]:
    """Indices of the `count` codes nearest to each row, best first; equally near ones in ascending order.

    Where more codes are equally near than `count` leaves room for, any of them are taken; see `nearest_code` for the
    rest.

    Raises:
        ValueError: If `count` is not between 1 and k.
    """
    check_metric(metric)
    if not 1 <= count <= len(codebook):
        raise ValueError(f"count must lie between 1 and the {len(codebook)} codes, got {count}")
    rows, codebook = rows.detach(), codebook.detach()
    if metric == "euclidean":
        codebook, rows = with_bias(codebook, rows, -half_norms(codebook))
    return _nearest(rows, codebook, count)


@torch.library.custom_op("vistok::nearest", mutates_args=())
@in_float32
def _nearest(rows: Tensor, keys: Tensor, count: int) -> Tensor:
    n, k = len(rows), len(keys)
    rows = pad_rows(rows)
    tile_rows, tile_codes = tile_shape(n, k, rows.device)
    buffer = rows.new_empty(tile_rows * tile_codes)
    indices = torch.empty(len(rows), count, dtype=torch.int64, device=rows.device)
    for part in slices(len(rows), tile_rows):
        columns = rows[part].T.contiguous()
        if count == 1 and k <= tile_codes:
            indices[part, 0] = column_argmax(product(keys, columns.T, buffer))
            continue
        search = Search(keys, rows[part], tile_codes)
        for codes in slices(k, tile_codes):
            search.add(product(keys[codes], columns.T, buffer))
        indices[part] = search.best(count)
        # Before the next search notes as many peaks.
        del search
    return indices[:n]


@_nearest.register_fake
def _(rows: Tensor, keys: Tensor, count: int) -> Tensor:
    return torch.empty(len(rows), count, dtype=torch.int64, device=rows.device)


def group_peaks(scores: Tensor, peaks: Tensor) -> None:
    """Write the largest of each `GROUP` scores ``(codes r)`` to the first rows of `peaks`."""
    whole = len(scores) // GROUP
    if whole:
        torch.amax(scores[: whole * GROUP].view(whole, GROUP, scores.shape[1]), 1, out=peaks[:whole])
    if whole * GROUP < len(scores):
        torch.amax(scores[whole * GROUP :], 0, out=peaks[whole])


def column_argmax(scores: Tensor) -> Tensor:
    """Index of the largest score of each column of ``(codes r)``, the lowest if there are several: ``(r)``."""
    k, columns = scores.shape
    peaks = scores.new_empty(-(-k // GROUP), columns)
    group_peaks(scores, peaks)
    groups = _first_of(peaks, torch.amax(peaks, 0))
    candidates = groups * GROUP + torch.arange(GROUP, device=scores.device).unsqueeze(-1)
    # Past the end the last code stands in, which does not come before itself.
    scores = scores.gather(0, candidates.clamp_(max=k - 1))
    within = _first_of(scores, torch.amax(scores, 0))
    return torch.add(groups * GROUP, within).clamp_(max=k - 1)


def _first_of(scores: Tensor, values: Tensor) -> Tensor:
    """First row of each column where a value is: an argmax of known maxima, several times faster; NaN gives 0."""
    # As floats, whose minima vectorise.
    rows = torch.arange(len(scores), dtype=scores.dtype, device=scores.device).unsqueeze(-1)
    first = torch.where(scores == values, rows, torch.inf).amin(0)
    return first.nan_to_num_(posinf=0).long()


class Search:
    """Finds the keys with the largest scores from tiles of scores that are gone when the search ends.

    Args:
        keys: ``(k d)``.
        rows: ``(r d)``.
        tile_codes: Codes of every tile but the last.
    """

    def __init__(self, keys: Tensor, rows: Tensor, tile_codes: int) -> None:
        self.keys, self.rows = keys, rows
        self.groups = -(-tile_codes // GROUP)
        tiles = -(-len(keys) // tile_codes)
        self.tile_codes = tile_codes
        self.group_peaks = rows.new_empty(tiles, self.groups, len(rows))
        # The last tile may be smaller and leave some of its groups unwritten.
        self.group_peaks[-1] = -torch.inf
        self.tile_peaks = rows.new_empty(tiles, len(rows))
        self.tile = 0

    def add(self, scores: Tensor) -> Tensor:
        """Note the next tile ``(codes r)`` and return its largest score of each row, ``(r)``."""
        peaks, peak = self.group_peaks[self.tile], self.tile_peaks[self.tile]
        group_peaks(scores, peaks)
        torch.amax(peaks, 0, out=peak)
        self.tile += 1
        return peak

    def best(self, count: int) -> Tensor:
        """Indices of the `count` largest scores of each row, ``(r count)``."""
        if count == 1:
            tile = self.tile_peaks.argmax(0)
            group = self.group_peaks[tile, :, torch.arange(len(tile), device=tile.device)].argmax(-1)
            groups = (tile * self.groups + group).unsqueeze(-1)
        else:
            flat = self.group_peaks.flatten(0, 1)
            # In ascending order a stable sort leaves equal scores in the order of their indices.
            groups = flat.topk(min(count, len(flat)), 0).indices.sort(0).values.T
        candidates = self._codes_of(groups)
        scores = torch.stack([self._scores(codes) for codes in candidates.unbind(1)], 1).flatten(1)
        candidates = candidates.flatten(1)
        if count == 1:
            return candidates.gather(1, scores.argmax(-1, keepdim=True))
        return candidates.gather(1, scores.sort(dim=-1, descending=True, stable=True).indices[:, :count])

    def _codes_of(self, groups: Tensor) -> Tensor:
        """Codes of groups ``(r g)``: ``(r g GROUP)``; past the end of a tile or table they are k."""
        tile, group = groups // self.groups, groups % self.groups
        within = group.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=groups.device)
        codes = tile.unsqueeze(-1) * self.tile_codes + within
        return torch.where(within < self.tile_codes, codes, len(self.keys)).clamp_(max=len(self.keys))

    def _scores(self, codes: Tensor) -> Tensor:
        """Scores of codes ``(r GROUP)``, minus infinity where there is none."""
        missing = codes == len(self.keys)
        keys = self.keys[codes.masked_fill(missing, 0)]
        return torch.bmm(keys, self.rows.unsqueeze(-1)).squeeze(-1).masked_fill_(missing, -torch.inf)
