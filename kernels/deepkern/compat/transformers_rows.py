"""Which rows of a padded batch hold tokens, from the attention mask of transformers.

transformers pads a batch to a rectangle and masks the padding.  The attention ops take ragged
sequences without padding.  A token attends to the unmasked tokens up to itself, so the tokens of a
sequence can be packed, wherever its padding is.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class Rows:
    """The tokens of B sequences: `past` cached columns and S new ones.

    mask: bool [B, past + S], true for tokens; None if all columns hold tokens.
    """

    def __init__(self, B: int, S: int, past: int, device: torch.device, mask: Tensor | None):
        self.B, self.S, self.past, self.mask = B, S, past, mask
        self.num_columns = past + S
        if mask is None:
            starts = torch.arange(B + 1, dtype=torch.int32, device=device)
            self.cu_seqlens_q, self.cu_seqlens_k = starts * S, starts * self.num_columns
            self.lengths = starts.new_full((B,), self.num_columns)
            return
        new = mask[:, past:]
        self.lengths = mask.sum(1, dtype=torch.int32)
        self.cu_seqlens_k = boundaries(self.lengths)
        self.cu_seqlens_q = boundaries(new.sum(1, dtype=torch.int32))
        self.queries = new.reshape(-1).nonzero().squeeze(1)  # rows of [B * S]
        self.sequences, self.columns = mask.nonzero(as_tuple=True)  # of the tokens of [B, T]

    def packed_queries(self, x: Tensor) -> Tensor:
        """x [B, S, ...] -> [tokens, ...]."""
        rows = x.flatten(0, 1)
        return rows if self.mask is None else rows.index_select(0, self.queries)

    def padded_queries(self, rows: Tensor) -> Tensor:
        """[tokens, N] -> [B, S, N], zeros in the padding."""
        if self.mask is not None:
            out = rows.new_zeros(self.B * self.S, rows.shape[1])
            rows = out.index_copy(0, self.queries, rows)
        return rows.view(self.B, self.S, -1)

    def packed_keys(self, x: Tensor) -> Tensor:
        """x [B, T or more, N] -> [tokens, N]."""
        if self.mask is None:
            return x[:, : self.num_columns].reshape(self.B * self.num_columns, -1)
        return x[self.sequences, self.columns]

    def pages(self, capacity: int, page: int) -> tuple[int, Tensor]:
        """The page size and block table int32 [B, pages] of a storage [B, capacity, ...].

        `page` divides the capacity.  With padding each token is a page.
        """
        device = self.lengths.device
        if self.mask is None:
            table = torch.arange(self.B * capacity // page, dtype=torch.int32, device=device)
            return page, table.view(self.B, -1)
        offsets = torch.arange(self.B, device=device) * capacity
        order = self.mask.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
        return 1, (order + offsets[:, None]).to(torch.int32)


def boundaries(lengths: Tensor) -> Tensor:
    """int32 [B] -> int32 [B + 1], the first row of each sequence and the end of the last."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def visible_keys(mask: Tensor) -> Tensor:
    """The mask of transformers, bool or additive, as bool: true where a query sees a key."""
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all():
        raise ValueError(
            "patch_transformers: attention_mask: expected 0 or the least number, got a bias"
        )
    return visible


def read_mask(mask: Tensor | None, B: int, S: int, past: int, device: torch.device) -> Rows:
    """Reads the attention mask of a layer, None or [B or 1, 1, S, past + S or more].

    Raises:
        ValueError: the mask is not causal with padding.
    """
    if mask is None:
        return Rows(B, S, past, device, None)
    T, name = past + S, "patch_transformers: attention_mask"
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != S or mask.shape[3] < T:
        raise ValueError(f"{name}: expected shape [{B}, 1, {S}, {T}], got {tuple(mask.shape)}")
    visible = visible_keys(mask)[:, 0].expand(B, -1, -1)
    tokens = visible[:, -1, :T]
    columns = torch.arange(visible.shape[2], device=device)
    causal = columns <= columns[past:T, None]
    expected = torch.nn.functional.pad(tokens, (0, len(columns) - T))[:, None] & causal
    if (visible != expected).any():
        raise ValueError(f"{name}: expected a causal mask with padding, got another pattern "
                         "(packed sequences, a prefix or a window)")  # fmt: skip
    return Rows(B, S, past, device, None if tokens.all() else tokens)


class RowsMemo:
    """The rows of the last forward pass: all layers of a model read the same mask."""

    def __init__(self) -> None:
        self.key, self.mask, self.rows, self.tables = None, None, None, {}

    def read(self, mask: Tensor | None, B: int, S: int, past: int, device: torch.device) -> Rows:
        changes = None if mask is None or mask.is_inference() else mask._version
        key = B, S, past, device, mask is None, changes
        if key != self.key or (mask is not None and self.mask() is not mask):
            self.rows, self.tables = read_mask(mask, B, S, past, device), {}
            self.key, self.mask = key, None if mask is None else weakref.ref(mask)
        return self.rows

    def pages(self, capacity: int, page: int) -> tuple[int, Tensor]:
        """`Rows.pages` of the rows read last."""
        if capacity not in self.tables:
            self.tables[capacity] = self.rows.pages(capacity, page)
        return self.tables[capacity]

    def __deepcopy__(self, memo: dict) -> RowsMemo:
        return RowsMemo()
