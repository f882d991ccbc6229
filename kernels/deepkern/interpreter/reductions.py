"""Reductions and scans in the interpreter: pairs of neighbours, then pairs of pairs.

This is the order of a GPU's butterfly reduction, except for the layout. It does not depend on the
other dimensions of the tile, it is valid for combine functions that do not commute, and it rounds
to the tile's dtype at each step, as the GPU does. `reduce_tiles` and `scan_tiles` replace
ReduceOps.apply_impl and ScanOps.apply_impl.
"""

import functools

import numpy as np
import triton.language as tl

from . import numbers


def _argmax(better, v1, i1, v2, i2):
    first = better(v1, v2) | ((v1 == v2) & (i1 < i2))
    return np.where(first, v1, v2), np.where(first, i1, i2)


_FAST = {  # combine functions of triton.language.standard, as functions of numpy arrays
    "_sum_combine": np.add,
    "_prod_combine": np.multiply,
    "_xor_combine": np.bitwise_xor,
    "_or_combine": np.bitwise_or,
    "_elementwise_max": numbers.maximum_number,
    "_elementwise_min": numbers.minimum_number,
    "_argmax_combine_tie_break_left": functools.partial(_argmax, np.greater),
    "_argmin_combine_tie_break_left": functools.partial(_argmax, np.less),
}


def _combiner(op, dtypes):
    """`op.combine_fn` as a function from tuples of arrays to a tuple of arrays."""
    fn = op.combine_fn
    name = getattr(fn, "__name__", "")
    ordinary = not any(d.name == "bf16" or d.name in numbers.FP8 or d == tl.int1 for d in dtypes)
    if ordinary and name in _FAST and fn is getattr(tl.standard, name, None):
        fast = _FAST[name]

        def combine(left, right):
            out = fast(*left, *right)
            return out if isinstance(out, tuple) else (out,)

        return combine
    body = fn.rewrite() if hasattr(fn, "rewrite") else getattr(fn, "fn", fn)

    def combine(left, right):
        tiles = [op.to_tensor(x, d) for x, d in zip((*left, *right), (*dtypes, *dtypes),
                                                    strict=True)]  # fmt: skip
        out = body(*tiles)
        out = out if isinstance(out, tuple) else (out,)
        if any(isinstance(t, tl.tensor) and t.dtype != d for t, d in zip(out, dtypes, strict=True)):
            raise TypeError(f"{name} must return the types of its arguments, {dtypes}")
        values = (t.handle.data if isinstance(t, tl.tensor) else t for t in out)
        return tuple(np.broadcast_to(v, left[0].shape) for v in values)

    return combine


def reduce_tiles(self, input):
    dtypes = [t.dtype for t in input]
    arrays = tuple(t.handle.data for t in input)
    rank, axis = arrays[0].ndim, self.axis
    arrays = tuple(a.reshape(-1) if axis is None else np.moveaxis(a, axis, 0) for a in arrays)
    combine = _combiner(self, dtypes)
    while len(arrays[0]) > 1:
        arrays = combine(tuple(a[0::2] for a in arrays), tuple(a[1::2] for a in arrays))
    out = [a[0] for a in arrays]
    if self.keep_dims:
        axes = range(rank) if axis is None else axis
        out = [np.expand_dims(a, tuple(axes) if axis is None else axes) for a in out]
    return [self.to_tensor(a, d) for a, d in zip(out, dtypes, strict=True)]


def scan_tiles(self, input):
    dtypes = [t.dtype for t in input]
    arrays = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    if self.reverse:
        arrays = [a[::-1] for a in arrays]
    combine, distance = _combiner(self, dtypes), 1
    while distance < len(arrays[0]):
        earlier = tuple(np.roll(a, distance, 0) for a in arrays)
        both = combine(earlier, tuple(arrays))
        pairs = zip(arrays, both, strict=True)
        arrays = [np.concatenate([a[:distance], c[distance:]]) for a, c in pairs]
        distance *= 2
    if self.reverse:
        arrays = [a[::-1] for a in arrays]
    out = [np.ascontiguousarray(np.moveaxis(a, 0, self.axis)) for a in arrays]
    return [self.to_tensor(a, d) for a, d in zip(out, dtypes, strict=True)]
