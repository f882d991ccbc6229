"""Patches of Triton's interpreter: launches, the language, boolean operators, autotuning."""

import ast
import functools
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.runtime import interpreter as upstream

from .memory import InterpreterMemoryError, InterpreterRaceError, Launch, tensors

_REQUIRED = """ASTTransformer GridExecutor InterpretedFunction InterpreterBuilder InterpreterError
ReduceOps ScanOps TensorHandle _LangPatchScope _MISSING _convert_float _get_np_dtype _implicit_cvt
_patch_lang _validate_np_data_size"""


def apply() -> None:
    """Replace the parts of Triton's interpreter that the package docstring lists."""
    missing = [name for name in _REQUIRED.split() if not hasattr(upstream, name)]
    if missing:
        raise RuntimeError(
            f"deepkern does not support the interpreter of triton {triton.__version__} (it lacks "
            f"{', '.join(missing)}); it was tested with 3.6.0, 3.7.1 and 3.9.0"
        )
    from . import ops, reductions  # both use the names that were just checked

    for name, method in ops.METHODS.items():
        if name in ops.ADDED or hasattr(upstream.InterpreterBuilder, name):
            setattr(upstream.InterpreterBuilder, name, method)
    upstream._convert_float = lambda data, source, target, mode: _bits(
        ops.numbers.cast(data, source.name, target.name)
    )
    upstream.ReduceOps.apply_impl = reductions.reduce_tiles
    upstream.ScanOps.apply_impl = reductions.scan_tiles
    upstream._get_np_dtype = _cached_by_name(upstream._get_np_dtype)
    _patch_launch()
    _patch_language(triton.language)
    _patch_boolean_operators(triton.language)
    _patch_autotuner()


def _bits(data):
    return data.view(f"u{data.dtype.itemsize}")


def _cached_by_name(get_np_dtype):
    cache = {}

    def cached(dtype):
        if dtype.name not in cache:
            cache[dtype.name] = get_np_dtype(dtype)
        return cache[dtype.name]

    return cached


def _patch_launch():
    """Give every launch a `Launch`: windows for its arguments, its grid, its race record."""
    executor, builder = upstream.GridExecutor, upstream.InterpreterBuilder
    call, to_host, to_device = (
        executor.__call__,
        executor._init_args_hst,
        executor._restore_args_dev,
    )
    convert, set_dim, set_idx = upstream._implicit_cvt, builder.set_grid_dim, builder.set_grid_idx
    tl = upstream.tl

    def scalar(value, np_dtype, dtype):
        return tl.tensor(upstream.TensorHandle(np.array([value], np_dtype), dtype), dtype)

    @functools.wraps(call)
    def call_with_windows(self, *args, **kwargs):
        outer, Launch.current = Launch.current, Launch(self.fn.__name__)
        try:
            with np.errstate(all="ignore"):
                return call(self, *args, **kwargs)
        except upstream.InterpreterError as error:
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
        # CPU tensors were not copied, so there is nothing to copy back.
        arguments = [t for arg in (*args, *kwargs.values()) for _, t in tensors("", arg)]
        if any(getattr(t, "base", t).device.type != "cpu" for t in arguments):
            to_device(self, args, host, kwargs, host_kwargs)

    @functools.wraps(convert)
    def implicit_cvt(arg):
        # As in a compiled launch, Python numbers become scalars with a fixed type.
        if isinstance(arg, bool):
            return scalar(arg, np.bool_, tl.int1)
        if isinstance(arg, float):
            return scalar(arg, np.float32, tl.float32)
        if hasattr(arg, "data_ptr"):
            return scalar(
                Launch.current.by_tensor[id(arg)].fake_address, np.uint64, convert(arg).type
            )
        return convert(arg)

    def set_grid_dim(self, *grid):
        Launch.current.start(grid)
        set_dim(self, *grid)

    def set_grid_idx(self, x, y, z):
        set_idx(self, *Launch.current.visit(x, y, z))

    executor.__call__, executor._init_args_hst = call_with_windows, init_args
    executor._restore_args_dev, upstream._implicit_cvt = restore_args, implicit_cvt
    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx


def _patch_language(tl):
    """Redirect triton.language once per launch instead of at each call, and always restore it."""
    upstream_patch = upstream._patch_lang
    all_modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    changes, depth = [], 0

    def record():
        scope = upstream_patch(all_modules)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        interpreted_to_ir = tl.dtype.to_ir

        def to_ir(self, builder):  # upstream lacks these two before 3.9
            missing = {"fp8e4b8": "get_fp8e4b8_ty", "fp8e5b16": "get_fp8e5b16_ty"}
            if self.name in missing:
                return getattr(builder, missing[self.name])()
            return interpreted_to_ir(self, builder)

        def dot_scaled(*_, **__):
            raise NotImplementedError("the interpreter of this Triton has no tl.dot_scaled")

        scope.set_attr(tl.dtype, "to_ir", to_ir)
        if not hasattr(upstream.InterpreterBuilder, "create_dot_scaled"):
            scope.set_attr(tl, "dot_scaled", dot_scaled)
        new = {(id(obj), name): vars(obj)[name] for obj, name, _ in scope._changes}
        changes.extend((*change, new[id(change[0]), change[1]]) for change in scope._changes)

    def restore():
        nonlocal depth
        depth -= 1
        if depth == 0:
            for obj, name, old, _ in reversed(changes):
                delattr(obj, name) if old is upstream._MISSING else setattr(obj, name, old)

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

    upstream._patch_lang, upstream.InterpretedFunction.__call__ = patch_lang, device_function


def _patch_boolean_operators(tl):
    """Make `and`, `or`, `not` elementwise on tensors and evaluate both sides, as when compiled."""
    transformer = upstream.ASTTransformer

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
    # Rewritten kernels look these up in the upstream module.
    upstream._deepkern_bool_op, upstream._deepkern_not_op = bool_op, not_op
    probe = transformer().visit(ast.parse("x = a and b"))
    if any(isinstance(node, ast.BoolOp) for node in ast.walk(probe)):
        visit_assign = transformer.visit_Assign  # before 3.8 it does not visit the value

        def visit_assign_and_value(self, node):
            node.value = self.visit(node.value)
            return visit_assign(self, node)

        transformer.visit_Assign = visit_assign_and_value


def _patch_autotuner():
    """Time nothing: every configuration takes 0 ms, and the first of equal times is selected."""
    from triton.runtime.autotuner import Autotuner

    def do_bench(self):
        return lambda kernel_call, quantiles: [0.0, 0.0, 0.0]

    Autotuner.do_bench = property(do_bench, lambda self, value: None)
    try:
        _ = triton.runtime.driver.active
    except Exception:  # no GPU driver: install a stub with the properties that launchers read
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
