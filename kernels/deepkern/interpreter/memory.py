"""Checked memory for Triton's interpreter: bounds, alignment, and races between programs.

The interpreter gives kernels the real addresses of their tensors, so a wrong offset silently reads
or writes other memory. Here every tensor argument of a launch gets its own window of fake address
space: 2^48 bytes, with the tensor near the middle. The high bits of an address then name the
argument, and the rest is the offset in it, so an access that lands in a neighbouring tensor is an
error too. An access is translated to the tensor's storage after it has been checked.

The checked range of an argument is its *view*: from `data_ptr` to the last element that its strides
reach. Rows of the storage outside that view are out of bounds. The gaps between the rows of a
strided view are not checked, nor are masked-off lanes. An address that is not a multiple of the
element size is an error, as on a GPU.

Races: a shadow of each written storage records the last program that wrote each element. These are
errors:
(a) two programs write different bits to one element;
(b) a program loads, or updates atomically, an element that another program wrote;
(c) two lanes of one store write different bits to one element.
(a) and (b) are allowed if both programs have performed an atomic with ordering (any `sem` except
"relaxed") in this launch: locks and last-program-reduces counters work that way. Programs run one
after another, so a load that runs *before* the other program's store is detected only when the grid
runs in the opposite order: DEEPKERN_INTERPRETER_ORDER=reverse.
"""

import os
import random

import numpy as np
import torch

_WINDOW_BITS = 48  # log2 of the bytes of fake address space per argument
_FIRST_WINDOW = 1 << 8  # fake addresses start at 2^56; real addresses end at 2^47
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class InterpreterMemoryError(IndexError):
    """A kernel accessed memory outside its tensors, or at a misaligned address."""


class InterpreterRaceError(RuntimeError):
    """The result of a launch depends on the order in which its programs run."""


def tensors(name, arg):
    """The tensors inside a kernel argument, as (name for messages, tensor)."""
    if isinstance(arg, tuple):
        for i, item in enumerate(arg):
            yield from tensors(f"{name}[{i}]", item)
    elif hasattr(arg, "data_ptr"):
        yield name, arg
    elif hasattr(arg, "block_shape") and hasattr(arg, "base"):  # a host TensorDescriptor
        yield name, arg.base


class Window:
    """The fake address range of one tensor argument, and the bytes of that tensor."""

    def __init__(self, number, name, tensor):
        tensor = getattr(tensor, "base", tensor)  # triton.reinterpret wraps the tensor
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.name, self.tensor = name, tensor
        self.real_address = tensor.data_ptr()
        self.nbytes = span * tensor.element_size() if tensor.numel() else 0
        # The low bits equal those of the real address, which keeps the alignment. The position
        # differs a little per window, so that a round offset (such as 2^48) does not lead from one
        # tensor into the next.
        middle = (1 << _WINDOW_BITS - 1) + (number << _WINDOW_BITS - 16) % (1 << _WINDOW_BITS - 2)
        base = _FIRST_WINDOW + number << _WINDOW_BITS
        self.fake_address = base + middle + self.real_address % 4096
        storage = tensor.untyped_storage()
        self.storage, self.storage_nbytes = storage.data_ptr(), storage.nbytes()
        self.start = tensor.storage_offset() * tensor.element_size()
        storage_bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.bytes = storage_bytes[self.start : self.start + self.nbytes]
        self._views = {}

    def view(self, size):
        """The argument's memory as unsigned integers of `size` bytes."""
        if size not in self._views:
            elements = self.bytes[: self.nbytes // size * size]
            self._views[size] = elements.view(_UINT[size])
        return self._views[size]


class Launch:
    """The state of the running launch that the checks need."""

    current = None

    def __init__(self, kernel):
        self.kernel = kernel
        self.windows = []
        self.by_tensor = {}  # id of the host tensor -> its window
        self.shadows = {}  # storage -> (bytes per entry, 1 + the program that wrote each entry)
        self.grid, self.program, self.order = (1, 1, 1), 0, None
        self.has_ordered = None  # [1 + program]: whether it has performed an ordering atomic
        self.check_races = True

    def add(self, name, arg):
        """Create a window for every tensor inside a kernel argument."""
        for full_name, tensor in tensors(name, arg):
            self.by_tensor[id(tensor)] = Window(len(self.windows), full_name, tensor)
            self.windows.append(self.by_tensor[id(tensor)])

    def start(self, grid):
        self.grid = grid
        count = grid[0] * grid[1] * grid[2]
        self.has_ordered = np.zeros(count + 1, dtype=bool)
        order = os.environ.get("DEEPKERN_INTERPRETER_ORDER", "")
        if order == "reverse":
            self.order = range(count - 1, -1, -1)
        elif order.startswith("random:"):
            self.order = random.Random(int(order[7:])).sample(range(count), count)
        elif order:
            raise ValueError(
                f"DEEPKERN_INTERPRETER_ORDER={order!r}: expected reverse or random:SEED"
            )

    def visit(self, x, y, z):
        """The coordinates of the program to run when the grid loop is at (x, y, z)."""
        _, ny, nz = self.grid
        self.program = (x * ny + y) * nz + z
        if self.order is not None:
            self.program = self.order[self.program]
        return self.coordinates(self.program)

    def coordinates(self, program):
        _, ny, nz = self.grid
        return program // (ny * nz), program // nz % ny, program % nz

    # Bounds and alignment

    def locate(self, pointers, mask, size, access):
        """Check an access and split it into [(window, byte offsets, lanes)]; lanes None = all.

        `mask` is None or boolean. When lanes is None, the offsets of masked-off lanes may be
        anywhere, and the caller must not use them.
        """
        window = self._window(int(pointers.flat[0])) if pointers.size else None
        if window is not None:
            offsets = (pointers - np.uint64(window.fake_address)).view(np.int64)
            if offsets.min() >= 0 and offsets.max() + size <= window.nbytes:
                low_bits = np.bitwise_or.reduce(offsets, axis=None) | window.real_address
                if low_bits & (size - 1):
                    self._check(window, pointers, offsets.ravel(), mask, size, access)
                return [(window, offsets, None)]
        lanes = np.arange(pointers.size) if mask is None else np.flatnonzero(mask)
        flat = pointers.ravel()[lanes]
        numbers = flat >> np.uint64(_WINDOW_BITS)
        accesses = []
        for number in np.unique(numbers):
            member = numbers == number
            addresses = flat[member]
            window = self._window(int(addresses[0]))
            if window is not None:
                offsets = (addresses - np.uint64(window.fake_address)).view(np.int64)
            else:
                window, offsets = self._locate_real(addresses, access)
            self._check(window, pointers, offsets, None, size, access, lanes[member])
            accesses.append((window, offsets, lanes[member]))
        return accesses

    def _window(self, address):
        number = (address >> _WINDOW_BITS) - _FIRST_WINDOW
        return self.windows[number] if 0 <= number < len(self.windows) else None

    def _locate_real(self, addresses, access):
        """Find pointers that a kernel loaded from memory: a table of data_ptr values is real."""
        for window in self.windows:
            offsets = (addresses - np.uint64(window.real_address)).view(np.int64)
            if window.nbytes and offsets.min() >= 0 and offsets.max() < window.nbytes:
                return window, offsets
        raise InterpreterMemoryError(
            f"{self._location(access)} address {int(addresses[0]):#x}, which is in no tensor "
            "argument of this launch. (A pointer loaded from memory works only if the tensor that "
            "it points to is an argument as well.)"
        )

    def _check(self, window, pointers, offsets, mask, size, access, lanes=None):
        outside = (offsets < 0) | (offsets + size > window.nbytes)
        bad = outside | (offsets + window.real_address & (size - 1) != 0)
        if mask is not None:
            bad &= np.ravel(mask)
        if not bad.any():
            return
        first = int(np.flatnonzero(bad)[0])
        lane = np.unravel_index(first if lanes is None else int(lanes[first]), pointers.shape)
        byte, limit = int(offsets[first]), window.nbytes // size
        if outside[first]:
            problem = f"outside [0, {limit})"
        else:
            problem = f"misaligned for {size}-byte elements"
        raise InterpreterMemoryError(
            f"{self._location(access)} argument '{window.name}' at element offset {byte // size} "
            f"(byte {byte}), {problem}: {window.tensor.dtype} tensor of shape "
            f"{tuple(window.tensor.shape)} and strides {tuple(window.tensor.stride())}; "
            f"lane {tuple(map(int, lane))} of a tile of shape {pointers.shape}, "
            f"{int(bad.sum())} lanes bad"
        )

    def _location(self, access):
        return f"kernel '{self.kernel}', program {self.coordinates(self.program)}: {access}"

    # Races

    def _shadow_entries(self, window, offsets, size):
        """The shadow of the window's storage, and the index in it of the elements at `offsets`."""
        if window.storage not in self.shadows:
            entries = -(-window.storage_nbytes // size)
            self.shadows[window.storage] = size, np.zeros(entries, dtype=np.int32)
        unit, shadow = self.shadows[window.storage]
        if size < unit:
            shadow = np.repeat(shadow, unit // size)
            self.shadows[window.storage] = unit, shadow = size, shadow
        entries = offsets + window.start >> unit.bit_length() - 1
        if size > unit:
            entries = entries[..., None] + np.arange(size // unit)
        return shadow, entries

    def _is_unordered(self, writer):
        """Which elements, last written by `writer`, another program wrote without ordering."""
        unordered = (writer != 0) & (writer != self.program + 1)
        if self.has_ordered[self.program + 1]:
            unordered &= ~self.has_ordered[writer]
        return unordered

    def before_read(self, window, offsets, size, access="load of"):
        if window.storage not in self.shadows or not self.check_races:
            return
        shadow, entries = self._shadow_entries(window, offsets, size)
        writer = shadow.take(entries, mode="clip")
        unordered = self._is_unordered(writer)
        if unordered.any():
            first = np.unravel_index(int(np.flatnonzero(unordered)[0]), unordered.shape)
            element = int(offsets[first[: offsets.ndim]]) // size
            raise InterpreterRaceError(
                f"{self._location(access)} argument '{window.name}' at element offset {element}, "
                f"which program {self.coordinates(int(writer[first]) - 1)} of the same launch "
                "wrote; nothing orders the two"
            )

    def write(self, window, offsets, size, values):
        """Store the bits `values` at `offsets` (1-d) and record the writing program."""
        memory, index = window.view(size), offsets >> size.bit_length() - 1
        if not self.check_races:
            memory[index] = values
            return
        shadow, entries = self._shadow_entries(window, offsets, size)
        writer = shadow[entries]
        unordered = self._is_unordered(writer)
        if unordered.any():
            differs = memory[index] != values
            bad = unordered & (differs if unordered.ndim == 1 else differs[:, None])
            if bad.any():
                first = tuple(np.argwhere(bad)[0])
                lane = int(first[0])
                other = self.coordinates(int(writer[first]) - 1)
                old, new = int(memory[index[lane]]), int(values[lane])
                self._raise_conflict(window, int(index[lane]), other, old, new, size)
        memory[index] = values
        shadow[entries] = self.program + 1
        overwritten = memory[index] != values
        if overwritten.any():
            lane = int(np.flatnonzero(overwritten)[0])
            old, new = int(values[lane]), int(memory[index[lane]])
            self._raise_conflict(window, int(index[lane]), None, old, new, size)

    def _raise_conflict(self, window, element, other, old, new, size):
        writers = "two lanes of this store" if other is None else f"program {other} and this one"
        dtype = window.tensor.dtype
        bits = f"{old:#x} and {new:#x}"
        if dtype.itemsize == size:
            pair = torch.from_numpy(np.array([old, new], dtype=_UINT[size])).view(dtype)
            bits += f" ({pair[0].item()} and {pair[1].item()} as {dtype})"
        raise InterpreterRaceError(
            f"{self._location('store to')} argument '{window.name}' at element offset {element}: "
            f"{writers} write different values, {bits}"
        )
