"""Operations of the interpreter's builder: arithmetic, casts, dots, loads, stores and atomics.

The methods of `Builder` replace those of the same name in Triton's InterpreterBuilder.
"""

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as upstream

from . import numbers
from .memory import Launch

Handle = upstream.TensorHandle
_COMPARISONS = {
    *(np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal),
}
_WRAPPING = {np.add, np.subtract, np.multiply}
# Computed in float64 and rounded, so that the result does not depend on the machine's SIMD width or
# the tile's layout. (A GPU approximates these to 1 or 2 units in the last place.)
_TRANSCENDENTAL = {np.exp, np.exp2, np.log, np.log2, np.sin, np.cos}


def _format(handle):
    return handle.dtype.scalar.name


def _refuse_fp8(name):
    if name in numbers.FP8:
        raise TypeError(f"no GPU has arithmetic or comparisons on {name}: cast to a wider type")


class Builder:
    # Arithmetic

    def binary_op(self, lhs, rhs, op):
        name, a, b = _format(lhs), lhs.data, rhs.data
        _refuse_fp8(name)
        if name == "bf16":  # rounding via float32 equals rounding bf16 results once
            a, b = numbers.decode(a, name), numbers.decode(b, name)
        if a.dtype == b.dtype == np.bool_ and op in _WRAPPING:  # int1 is an integer of one bit
            a, b = a.astype(np.int8), b.astype(np.int8)
            return Handle((op(a, b) & 1).astype(np.bool_), lhs.dtype.scalar)
        out = op(a, b)
        if op in _COMPARISONS:
            return Handle(out, tl.int1)
        if name == "bf16":
            out = numbers.encode(out, name)
        elif not upstream._validate_np_data_size(out, lhs.dtype.scalar):
            out = out.astype(upstream._get_np_dtype(lhs.dtype.scalar))
        return Handle(out, lhs.dtype.scalar)

    def unary_op(self, arg, op):
        name = _format(arg)
        _refuse_fp8(name)
        x = numbers.decode(arg.data, name) if name == "bf16" else arg.data
        out = op(x.astype(np.float64)) if op in _TRANSCENDENTAL else op(x)
        if name in numbers.FLOATS:
            out = numbers.encode(out, name)
        return Handle(out, arg.dtype.scalar)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, numbers.maximum_number)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, numbers.minimum_number)

    def create_maximumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, numbers.maximum_nan)

    def create_minimumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, numbers.minimum_nan)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        if propagate_nans == ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.create_minimumf(self.create_maximumf(arg, lo), hi)

    def create_fma(self, x, y, z):
        name = _format(z)
        _refuse_fp8(name)
        if name == "fp64":  # two roundings: neither numpy nor Python < 3.13 has this fma
            return Handle(x.data * y.data + z.data, z.dtype.scalar)
        out = numbers.fma(*(numbers.decode(v.data, name) for v in (x, y, z)))
        return Handle(numbers.encode(out, name), z.dtype.scalar)

    def create_rsqrt(self, arg):
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x.astype(np.float64)))

    def create_erf(self, arg):
        return self.unary_op(
            arg, lambda x: torch.erf(torch.from_numpy(x.astype(np.float64))).numpy()
        )

    # Casts

    def cast_impl(self, src, dst_type):
        return self.create_fp_to_fp(src, dst_type, None)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        source, target, data = _format(src), dst_type.scalar, src.data
        np_target = upstream._get_np_dtype(target)
        if source in numbers.FLOATS and target.name in numbers.FLOATS:
            rtz = rounding_mode == ir.ROUNDING_MODE.RTZ
            data = numbers.cast(data, source, target.name, rtz)
        elif source in numbers.FLOATS:
            data = numbers.to_integer(numbers.decode(data, source), np_target)
        elif target.name in numbers.FLOATS:
            data = numbers.from_integer(data, target.name)
        else:
            data = data.astype(np_target)
        return Handle(data, target)

    def get_bf16(self, value):
        return self.cast_impl(self.get_fp32(value), tl.bfloat16)

    # Dots

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        names = {"TF32": "tf32", "TF32x3": "tf32x3", "IEEE": "ieee"}
        precision = names.get(input_precision.name)
        if precision is None and _format(a) == "fp32":
            raise NotImplementedError(f"input_precision {input_precision.name} of a float32 dot")
        dtype = d.data.dtype
        product = numbers.matmul(a.data, b.data, _format(a), _format(b), dtype, precision)
        return Handle(product + d.data, d.dtype.scalar)

    # Memory

    def create_load(self, ptr, *_, **__):
        return _load(ptr, None, None)

    def create_masked_load(self, ptrs, mask, other, *_, **__):
        return _load(ptrs, mask, other)

    def create_store(self, ptr, val, *_, **__):
        _store(ptr, val, None)

    def create_masked_store(self, ptrs, value, mask, *_, **__):
        _store(ptrs, value, mask)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        _record_ordering(sem)
        if _format(val) == "bf16":
            return _atomic_add_bf16(rmwOp, ptr, val, mask)
        real = Handle(_real_addresses(ptr, mask.data), ptr.dtype)
        return _UPSTREAM["create_atomic_rmw"](self, rmwOp, real, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        _record_ordering(sem)
        real = Handle(_real_addresses(ptr, None), ptr.dtype)
        return _UPSTREAM["create_atomic_cas"](self, real, cmp, val, sem, scope)

    def create_atomic_load(self, *args):
        return _without_race_check(self, "create_atomic_load", *args)

    def create_atomic_store(self, *args):
        return _without_race_check(self, "create_atomic_store", *args)

    def create_atomic_poll(self, *args):
        return _without_race_check(self, "create_atomic_poll", *args)

    def create_descriptor_load(self, desc, indices, *rest):
        out = _without_nan(self, "create_descriptor_load", desc, indices, *rest)
        if _pads_with_nan(desc):
            _fill_nan(out, desc.materialize_pointers(indices)[1])
        return out

    def create_tensor_pointer_load(self, ptr, boundary_check, padding_option, *rest):
        nan = padding_option == ir.PADDING_OPTION.PAD_NAN
        padding = ir.PADDING_OPTION.PAD_ZERO if nan else padding_option
        name = "create_tensor_pointer_load"
        out = _UPSTREAM[name](self, ptr, boundary_check, padding, *rest)
        if nan:
            _fill_nan(out, ptr.materialize_pointers(boundary_check)[1])
        return out

    def create_print(self, prefix, hex, values, *rest):
        printed = [v if hex else _readable(v) for v in values]
        _UPSTREAM["create_print"](self, prefix, hex, printed, *rest)


METHODS = {name: method for name, method in vars(Builder).items() if not name.startswith("_")}
_UPSTREAM = {k: v for k, v in vars(upstream.InterpreterBuilder).items() if k in METHODS}
ADDED = {"get_bf16"}  # some versions of Triton lack it


def _array_mask(mask, shape):
    """A mask as an array of the tile's shape, or None if it is all true."""
    mask = mask.data if isinstance(mask, Handle) else mask
    if mask is None or mask.all():
        return None
    return mask if mask.shape == shape else np.broadcast_to(mask, shape)


def _load(ptrs, mask, other):
    launch, pointers, dtype = Launch.current, ptrs.data, ptrs.get_element_ty()
    mask = _array_mask(mask, pointers.shape)
    np_dtype = upstream._get_np_dtype(dtype)
    size = np_dtype.itemsize
    accesses = launch.locate(pointers, mask, size, "load of")
    fill = np.zeros((), np_dtype) if other is None else other.data.astype(np_dtype, copy=False)
    if len(accesses) == 1 and accesses[0][2] is None:
        window, offsets, _ = accesses[0]
        launch.before_read(window, offsets if mask is None else offsets[mask], size)
        out = window.view(size).take(offsets >> size.bit_length() - 1, mode="clip").view(np_dtype)
        return Handle(out if mask is None else np.where(mask, out, fill), dtype)
    out = np.broadcast_to(fill, pointers.shape).copy()
    flat = out.reshape(-1)
    for window, offsets, lanes in accesses:
        launch.before_read(window, offsets, size)
        flat[lanes] = window.view(size)[offsets >> size.bit_length() - 1].view(np_dtype)
    return Handle(out, dtype)


def _store(ptrs, value, mask):
    launch, pointers = Launch.current, ptrs.data
    mask = _array_mask(mask, pointers.shape)
    np_dtype = upstream._get_np_dtype(ptrs.get_element_ty())
    size = np_dtype.itemsize
    values = np.broadcast_to(value.data.astype(np_dtype, copy=False), pointers.shape)
    bits = np.ascontiguousarray(values).view(f"u{size}")
    for window, offsets, lanes in launch.locate(pointers, mask, size, "store to"):
        if lanes is not None:
            launch.write(window, offsets, size, bits.reshape(-1)[lanes])
        elif mask is not None:
            launch.write(window, offsets[mask], size, bits[mask])
        else:
            launch.write(window, offsets.reshape(-1), size, bits.reshape(-1))


def _record_ordering(sem):
    """Record an atomic with ordering: it may be part of a lock (see memory.py)."""
    if sem != ir.MEM_SEMANTIC.RELAXED:
        Launch.current.has_ordered[Launch.current.program + 1] = True


def _without_race_check(builder, name, ptr, *args):
    """Run an atomic load or store as a plain one, without the race check."""
    launch = Launch.current
    _record_ordering(args[-2])
    launch.check_races = False
    try:
        return _UPSTREAM[name](builder, ptr, *args)
    finally:
        launch.check_races = True


def _atomic_lanes(ptrs, mask):
    launch = Launch.current
    size = upstream._get_np_dtype(ptrs.get_element_ty()).itemsize
    mask = _array_mask(mask, ptrs.data.shape)
    for window, offsets, lanes in launch.locate(ptrs.data, mask, size, "atomic on"):
        if lanes is None:
            lanes = np.arange(offsets.size) if mask is None else np.flatnonzero(mask)
            offsets = offsets.reshape(-1)[lanes]
        launch.before_read(window, offsets, size, "atomic on")
        yield window, offsets, lanes


def _real_addresses(ptrs, mask):
    real = np.zeros(ptrs.data.size, np.uint64)
    for window, offsets, lanes in _atomic_lanes(ptrs, mask):
        real[lanes] = (offsets + window.real_address).astype(np.uint64)
    return real.reshape(ptrs.data.shape)


def _atomic_add_bf16(op, ptrs, val, mask):
    if op != ir.ATOMIC_OP.FADD:
        raise NotImplementedError(f"atomic {op.name} on bf16")
    old = np.zeros(ptrs.data.size, np.uint16)
    add = numbers.decode(np.broadcast_to(val.data, ptrs.data.shape).reshape(-1), "bf16")
    for window, offsets, lanes in _atomic_lanes(ptrs, mask.data):
        memory = window.view(2)
        for index, lane in zip(offsets >> 1, lanes, strict=True):
            old[lane] = memory[index]
            new = numbers.decode(memory[index : index + 1], "bf16") + add[lane]
            memory[index] = numbers.encode(new, "bf16")[0]
    return Handle(old.reshape(ptrs.data.shape), val.dtype.scalar)


def _pads_with_nan(desc):
    return desc.padding == ir.PADDING_OPTION.PAD_NAN


def _readable(handle):
    name = _format(handle)
    bits = name == "bf16" or name in numbers.FP8
    return Handle(numbers.decode(handle.data, name), tl.float32) if bits else handle


def _without_nan(builder, name, desc, *args):
    """Pad with 0: the integer arrays of bf16 and FP8 cannot hold the np.nan of upstream."""
    padding = desc.padding
    try:
        if _pads_with_nan(desc):
            desc.padding = ir.PADDING_OPTION.PAD_ZERO
        return _UPSTREAM[name](builder, desc, *args)
    finally:
        desc.padding = padding


def _fill_nan(out, mask):
    nan = numbers.encode(np.full((1,), np.nan, np.float32), _format(out))
    out.data = np.where(mask.data if isinstance(mask, Handle) else mask, out.data, nan)
