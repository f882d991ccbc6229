"""The tokens of one forward pass, which may belong to any number of sequences.

A row is a token.  What a row computes depends on its own sequence only, and not on the other rows
of the pass: a token of a prompt attends through `mla_prefill` to keys that are expanded from the
latents, a generated token through `mla_decode` to the latents.  Which of the two a token takes is a
property of its request, so that its bits are the same in every batch.

The keys of a prompt are processed in blocks of PREFILL_BLOCK tokens, counted from the start of the
sequence.  A query attends to its own block first, then to the earlier ones in ascending order, and
`merge_states` joins the results.  So the bits do not depend on the chunks in which a prompt
arrives, and a prompt has at most one block of expanded keys at a time.
Source: chunked context with merged states is from vLLM; blocks at fixed positions are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.rope import pair_factors

PREFILL_BLOCK = 1024  # keys


class Segment(NamedTuple):
    """New tokens of one sequence: positions [start, stop).

    pages: of the sequence, in order, at least up to `stop`.
    prompt: whether they attend as tokens of a prompt.
    """

    start: int
    stop: int
    pages: list[int]
    prompt: bool


@dataclass
class PrefillStep:
    """One `mla_prefill`: the first `rows` rows of the batch attend to one block of keys each.

    cu_seqlens_q, cu_seqlens_k: int32 [S + 1], rows and keys of each segment.
    block_table: int32 [S, P].  starts: int32 [S], the first key of each segment.
    """

    rows: int
    keys: int
    causal: bool
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    block_table: Tensor
    starts: Tensor


@dataclass
class TokenBatch:
    """N rows; the first `num_prompt` are tokens of prompts, the others generated tokens.

    tokens, positions, slots: int64 [N].
    cos, sin: fp32 [N, 1, rope], the factors of a value and of its partner in a pair; `apply_rope`.
    cos_sin: fp32 [positions, rope], the table of `rope_cos_sin`.
    block_table: int32 [N, P], the pages of the sequence of each row.
    cache_seqlens: int32 [N], tokens that each row sees, itself included.
    longest: the largest of them.
    sequences: rows of one sequence each, and the tokens that the last of them sees.
    steps: for the prompt rows.
    order: int64 [N], the row of each token as the caller passed them; None if it is the same.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    cos_sin: Tensor
    num_prompt: int
    block_table: Tensor
    cache_seqlens: Tensor
    longest: int
    sequences: list[tuple[slice, int]]
    steps: list[PrefillStep]
    order: Tensor | None
    head_indices: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def head_index(self, heads: int, rows: int) -> Tensor:
        """int32 [heads·rows]: 0, `rows` times, then 1, and so on."""
        if (heads, rows) not in self.head_indices:
            index = torch.arange(heads, dtype=torch.int32, device=self.positions.device)
            self.head_indices[heads, rows] = index.repeat_interleave(rows)
        return self.head_indices[heads, rows]

    def slots_of(self, tokens: Tensor, page_size: int) -> Tensor:
        """int32 [N, K], positions in the sequence of each row -> their slots; -1 remains."""
        page = (tokens.clamp(min=0) // page_size).long()
        slots = self.block_table.gather(1, page) * page_size + tokens % page_size
        return torch.where(tokens < 0, tokens, slots)

    def in_order(self, rows: Tensor) -> Tensor:
        """rows [N, ...] of the batch in the order of the caller's tokens."""
        return rows if self.order is None else rows[self.order]


class Piece(NamedTuple):
    """Part of a segment in one block of keys; `offset` is its first token for the caller."""

    start: int
    stop: int
    pages: list[int]
    prompt: bool
    offset: int


def build_batch(
    tokens: Tensor, segments: list[Segment], page_size: int, cos_sin: Tensor
) -> TokenBatch:
    """The batch of `tokens` int64 [N], those of every segment in turn.

    cos_sin: `rope_cos_sin` of at least every position.
    """
    device = cos_sin.device
    pieces = sorted_pieces(segments)
    starts, offsets = np.array([p.start for p in pieces]), np.array([p.offset for p in pieces])
    table = np.zeros((len(pieces), max(len(p.pages) for p in pieces)), np.int32)
    for row, piece in zip(table, pieces, strict=True):
        row[: len(piece.pages)] = piece.pages
    positions, order, rows = starts, offsets, table
    if len(pieces) < len(tokens):  # not a row each
        counts = np.array([p.stop for p in pieces]) - starts
        positions, rows = ranges(starts, counts), np.repeat(table, counts, 0)
        order = ranges(offsets, counts)  # the token of each row
    slots = rows[np.arange(len(rows)), positions // page_size].astype(np.int64)
    slots = slots * page_size + positions % page_size

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    sorted_already = bool((offsets[1:] > offsets[:-1]).all())
    num_prompt = sum(p.stop - p.start for p in pieces if p.prompt)
    placed = move(positions)
    cos, sin = pair_factors(cos_sin[placed][:, None])
    return TokenBatch(
        tokens=tokens.to(device) if sorted_already else tokens.to(device)[move(order)],
        positions=placed,
        slots=move(slots),
        cos=cos,
        sin=sin,
        cos_sin=cos_sin,
        num_prompt=num_prompt,
        block_table=move(rows),
        cache_seqlens=move((positions + 1).astype(np.int32)),
        longest=int(positions.max()) + 1,
        sequences=rows_of(pieces),
        steps=prefill_steps([p for p in pieces if p.prompt], table, move),
        order=None if sorted_already else move(np.argsort(order)),
    )


def rows_of(pieces: list[Piece]) -> list[tuple[slice, int]]:
    """`TokenBatch.sequences`."""
    sequences, end = [], 0
    for piece in pieces:
        first, end = end, end + piece.stop - piece.start
        sequences.append((slice(first, end), piece.stop))
    return sequences


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[i], starts[i] + 1, ... counts[i] values of each, int64."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)


def sorted_pieces(segments: list[Segment]) -> list[Piece]:
    """Segments cut at blocks of keys: those of prompts, the latest block first, then the others.

    So the pieces that attend to the block i of earlier keys are the first ones, for each i.
    """
    pieces, offset = [], 0
    for start, stop, pages, prompt in segments:
        cuts = [start, stop]
        if prompt:
            inner = range((start // PREFILL_BLOCK + 1) * PREFILL_BLOCK, stop, PREFILL_BLOCK)
            cuts = [start, *inner, stop]
        for first, last in itertools.pairwise(cuts):
            pieces.append(Piece(first, last, pages, prompt, offset + first - start))
        offset += stop - start
    return sorted(pieces, key=lambda p: (not p.prompt, -(p.start // PREFILL_BLOCK) * p.prompt))


def prefill_steps(
    pieces: list[Piece], table: np.ndarray, move: Callable[[np.ndarray], Tensor]
) -> list[PrefillStep]:
    """The own block of every piece, then block 0, 1, ... of those that are past it.

    pieces: of prompts, as from `sorted_pieces`; table: int32 [S, P], a row for each at least.
    """
    if not pieces:
        return []
    block = [p.start // PREFILL_BLOCK for p in pieces]
    counts = [p.stop - p.start for p in pieces]

    def step(number: int, starts: list[int], keys: list[int], causal: bool) -> PrefillStep:
        return PrefillStep(
            sum(counts[:number]),
            sum(keys),
            causal,
            move(boundaries(counts[:number])),
            move(boundaries(keys)),
            move(table[:number]),
            move(np.array(starts, np.int32)),
        )

    own = [b * PREFILL_BLOCK for b in block]
    keys = [p.stop - first for p, first in zip(pieces, own, strict=True)]
    steps = [step(len(pieces), own, keys, causal=True)]
    for earlier in range(block[0]):
        number = sum(b > earlier for b in block)
        starts, keys = [earlier * PREFILL_BLOCK] * number, [PREFILL_BLOCK] * number
        steps.append(step(number, starts, keys, causal=False))
    return steps


def boundaries(counts: list[int]) -> np.ndarray:
    """int32 [S + 1], the sums of the first 0, 1, ... counts."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
