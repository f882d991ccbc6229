"""Triton's interpreter (TRITON_INTERPRET=1) made exact, memory-checked and race-checked.

Upstream does not promise right answers for bf16 and FP8 (triton issues 11584, 10945), and they
are silently wrong. Everything that mends this, the only monkey-patching of Triton in the project,
is in this module and its four parts:

interpreter_numbers  formats, casts, bf16 arithmetic, fma, min/max, dots, in numpy. Upstream takes
                     dots and arithmetic of bf16 *bit patterns*, truncates float32 -> bf16, rounds
                     float32 -> FP8 wrongly and does not saturate, wraps float -> int, rounds
                     tl.fma twice, lets NaN win in tl.maximum, ignores input_precision.
interpreter_ops      the builder's operations in terms of those, and the loads and stores.
interpreter_reduce   reductions and scans. Upstream's compare bit patterns, ignore the index operand
                     of argmax, and call a combine function once per element.
interpreter_memory   every load, store, atomic, descriptor and block pointer is held to the tensor
                     that its address was made from; races between programs raise.
here                 launches, `and`/`or`/`not` on tiles (upstream returns the second operand),
                     float and bool arguments (upstream leaves Python numbers, which promote
                     differently), scalars as loop bounds with numpy >= 2.4, autotuning without a
                     driver (the first configuration is taken, nothing is timed), and the cost of
                     a launch and of a call to a device function.

What stays inexact: the order and precision in which a GPU accumulates (a dot is one rounding of
the exact sum, then one addition to the accumulator); `/`, exp, log, sqrt, sin, ... on float32,
which a GPU approximates to 1-2 ulp and the interpreter rounds correctly; multiply-add contraction
(a * b + c becomes one fma on a GPU unless enable_fp_fusion=False); payloads of NaNs; flushing of
float32 subnormals by approximate functions; argmax of tiles with NaN, which depends on the layout.
Not interpreted: inline assembly, libdevice, tl.dot_scaled before Triton 3.8.

DEEPKERN_INTERPRETER_ORDER=reverse or random:SEED visits the programs of a grid in another order.
"""

import ast
import functools
import os
from types import SimpleNamespace

import numpy as np
import torch

from .interpreter_memory import InterpreterMemoryError, InterpreterRaceError, Launch, tensors

__all__ = ["InterpreterMemoryError", "InterpreterRaceError", "active", "install"]

_NEEDED = """ASTTransformer GridExecutor InterpretedFunction InterpreterBuilder InterpreterError
ReduceOps ScanOps TensorHandle _LangPatchScope _MISSING _convert_float _get_np_dtype _implicit_cvt
_patch_lang _validate_np_data_size"""
_installed = False


def active() -> bool:
    """Whether kernels of this process run in the mended interpreter."""
    return _installed


def install() -> bool:
    """Mend the interpreter if TRITON_INTERPRET asks for it; returns `active()`.

    Call it before any kernel runs. Without TRITON_INTERPRET=1 nothing is touched or imported.
    """
    global _installed
    wanted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if _installed or not wanted:
        return _installed
    import triton
    from triton.runtime import interpreter as stock

    missing = [name for name in _NEEDED.split() if not hasattr(stock, name)]
    if missing:
        raise RuntimeError(
            f"deepkern does not know the interpreter of triton {triton.__version__} (it lacks "
            f"{', '.join(missing)}); it was tested with 3.6.0, 3.7.1 and 3.9.0"
        )
    from . import interpreter_ops as ops
    from . import interpreter_reduce as reduce

    for name, method in ops.METHODS.items():
        if name in ops.ADDED or hasattr(stock.InterpreterBuilder, name):
            setattr(stock.InterpreterBuilder, name, method)
    stock._convert_float = lambda data, source, target, mode: _bits(
        ops.numbers.cast(data, source.name, target.name)
    )
    stock.ReduceOps.apply_impl = reduce.reduce_tiles
    stock.ScanOps.apply_impl = reduce.scan_tiles
    stock._get_np_dtype = _cached_by_name(stock._get_np_dtype)
    _patch_launch(stock)
    _patch_language(stock, triton.language)
    _patch_boolean_operators(stock, triton.language)
    _patch_autotuner(triton)
    _installed = True
    return True


def _bits(data):
    return data.view(f"u{data.dtype.itemsize}")


def _cached_by_name(get_np_dtype):
    known = {}

    def cached(dtype):
        if dtype.name not in known:
            known[dtype.name] = get_np_dtype(dtype)
        return known[dtype.name]

    return cached


def _patch_launch(stock):
    """Every launch gets a `Launch`: windows for its arguments, its grid, its race record."""
    executor, builder = stock.GridExecutor, stock.InterpreterBuilder
    call, to_host, to_device = (
        executor.__call__,
        executor._init_args_hst,
        executor._restore_args_dev,
    )
    convert, set_dim, set_idx = stock._implicit_cvt, builder.set_grid_dim, builder.set_grid_idx
    tl = stock.tl

    def scalar(value, np_dtype, dtype):
        return tl.tensor(stock.TensorHandle(np.array([value], np_dtype), dtype), dtype)

    @functools.wraps(call)
    def launch(self, *args, **kwargs):
        outer, Launch.current = Launch.current, Launch(self.fn.__name__)
        try:
            with np.errstate(all="ignore"):
                return call(self, *args, **kwargs)
        except stock.InterpreterError as error:
            cause = error
            while cause is not None:
                if isinstance(cause, InterpreterMemoryError | InterpreterRaceError):
                    raise cause from None
                cause = cause.__cause__
            raise
        finally:
            Launch.current = outer

    @functools.wraps(to_host)
    def init_args(self, args, kwargs):
        host, host_kwargs = to_host(self, args, kwargs)
        for name, arg in [*zip(self.arg_names, host, strict=False), *host_kwargs.items()]:
            Launch.current.add(name, arg)
        return host, host_kwargs

    @functools.wraps(to_device)
    def restore_args(self, args, host, kwargs, host_kwargs):
        # Tensors on the CPU were not copied: nothing to copy back.
        given = [t for arg in (*args, *kwargs.values()) for _, t in tensors("", arg)]
        if any(getattr(t, "base", t).device.type != "cpu" for t in given):
            to_device(self, args, host, kwargs, host_kwargs)

    @functools.wraps(convert)
    def implicit_cvt(arg):
        # As in a compiled launch, Python numbers come in as scalars of a type of their own.
        if isinstance(arg, bool):
            return scalar(arg, np.bool_, tl.int1)
        if isinstance(arg, float):
            return scalar(arg, np.float32, tl.float32)
        if hasattr(arg, "data_ptr"):
            return scalar(Launch.current.by_tensor[id(arg)].fake, np.uint64, convert(arg).type)
        return convert(arg)

    def set_grid_dim(self, *grid):
        Launch.current.start(grid)
        set_dim(self, *grid)

    def set_grid_idx(self, x, y, z):
        set_idx(self, *Launch.current.visit(x, y, z))

    executor.__call__, executor._init_args_hst = launch, init_args
    executor._restore_args_dev, stock._implicit_cvt = restore_args, implicit_cvt
    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx


def _patch_language(stock, tl):
    """Redirect triton.language once per launch, not at each call, and always undo it."""
    stock_patch = stock._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    changes, depth = [], 0

    def record():
        scope = stock_patch(everything)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        interpreted_to_ir = tl.dtype.to_ir

        def to_ir(self, builder):  # upstream's lacks these two before 3.9
            missing = {"fp8e4b8": "get_fp8e4b8_ty", "fp8e5b16": "get_fp8e5b16_ty"}
            if self.name in missing:
                return getattr(builder, missing[self.name])()
            return interpreted_to_ir(self, builder)

        def dot_scaled(*_, **__):
            raise NotImplementedError("the interpreter of this Triton has no tl.dot_scaled")

        scope.set_attr(tl.dtype, "to_ir", to_ir)
        if not hasattr(stock.InterpreterBuilder, "create_dot_scaled"):
            scope.set_attr(tl, "dot_scaled", dot_scaled)
        new = {(id(obj), name): vars(obj)[name] for obj, name, _ in scope._changes}
        changes.extend((*change, new[id(change[0]), change[1]]) for change in scope._changes)

    def restore():
        nonlocal depth
        depth -= 1
        if depth == 0:
            for obj, name, old, _ in reversed(changes):
                delattr(obj, name) if old is stock._MISSING else setattr(obj, name, old)

    def patch_lang(fn):
        nonlocal depth
        depth += 1
        if depth == 1 and not changes:
            record()
        elif depth == 1:
            for obj, name, _, new in changes:
                setattr(obj, name, new)
        return SimpleNamespace(restore=restore)

    def device_function(self, *args, **kwargs):
        if depth:
            return self.rewrite()(*args, **kwargs)
        scope = patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    stock._patch_lang, stock.InterpretedFunction.__call__ = patch_lang, device_function


def _patch_boolean_operators(stock, tl):
    """`and`, `or`, `not` on tensors as the compiler has them: elementwise, both sides evaluated."""
    transformer = stock.ASTTransformer

    def bool_op(method, *operands):
        tensors = []
        for operand in operands:
            value = operand()
            if isinstance(value, tl.tensor):
                tensors.append(value)
            elif bool(value) == (method == "logical_or"):
                return value
        while len(tensors) > 1:
            right, left = tensors.pop(), tensors.pop()
            tensors.append(getattr(left, method)(right))
        return tensors[0] if tensors else value

    def not_op(value):
        tensor = isinstance(value, tl.tensor) and value.dtype == tl.int1
        return value.__not__() if tensor else not value

    def visit_bool_op(self, node):
        self.generic_visit(node)
        none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        method = "logical_and" if isinstance(node.op, ast.And) else "logical_or"
        operands = [ast.Lambda(args=none, body=value) for value in node.values]
        name = ast.Name(id="_deepkern_bool_op", ctx=ast.Load())
        call = ast.Call(func=name, args=[ast.Constant(method), *operands], keywords=[])
        return ast.copy_location(call, node)

    def visit_unary_op(self, node):
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        name = ast.Name(id="_deepkern_not_op", ctx=ast.Load())
        return ast.copy_location(ast.Call(func=name, args=[node.operand], keywords=[]), node)

    transformer.visit_BoolOp, transformer.visit_UnaryOp = visit_bool_op, visit_unary_op
    stock._deepkern_bool_op, stock._deepkern_not_op = bool_op, not_op  # found by rewritten kernels
    probe = transformer().visit(ast.parse("x = a and b"))
    if any(isinstance(node, ast.BoolOp) for node in ast.walk(probe)):
        visit_assign = transformer.visit_Assign  # before 3.8 it does not look into the value

        def visit_value_too(self, node):
            node.value = self.visit(node.value)
            return visit_assign(self, node)

        transformer.visit_Assign = visit_value_too


def _patch_autotuner(triton):
    """No timing: every configuration takes no time, and the first of equals wins."""
    from triton.runtime.autotuner import Autotuner

    def do_bench(self):
        return lambda kernel_call, quantiles: [0.0, 0.0, 0.0]

    Autotuner.do_bench = property(do_bench, lambda self, value: None)
    try:
        _ = triton.runtime.driver.active
    except Exception:  # no GPU, no driver: one that answers what a launcher may ask
        from triton.backends.compiler import GPUTarget

        properties = SimpleNamespace(multi_processor_count=132)
        interface = SimpleNamespace(get_device_properties=lambda device=None: properties)
        stub = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
            get_device_interface=lambda: interface,
            get_benchmarker=lambda: do_bench(None),
        )
        triton.runtime.driver.set_active(stub)
