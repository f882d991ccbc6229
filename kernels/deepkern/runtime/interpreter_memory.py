"""Checked memory for Triton's interpreter: bounds, alignment, and races between programs.

The interpreter hands kernels the real addresses of their tensors, so a wrong offset silently
reads or writes whatever lies there. Here every tensor argument of a launch gets a window of fake
address space of its own, 2^48 bytes wide with the tensor near its middle. Whatever arithmetic a
kernel does, an address tells which argument it came from (its high bits) and where in that
argument it points (the rest), so an access that lands in a neighbouring tensor is an error too.
An access is translated to the storage of the tensor only once it has been checked.

What an argument covers is its *view*: from `data_ptr` to the last element that its strides reach.
Rows of the storage outside that view are out of bounds; gaps between the rows of a strided view
are not told apart. Lanes that are masked off are not checked. An address that is not a multiple of
the element size is an error, as it is on a GPU.

Races: a shadow of each written storage keeps which program last wrote each element. It is an error
(a) when two programs write different bits to one element, (b) when a program reads or updates
atomically an element that another program wrote, (c) when two lanes of one store carry different
bits to one element. (a) and (b) are let pass between two programs that have both performed an
atomic with ordering (any `sem` but "relaxed") in this launch: locks and last-one-reduces counters
are built so. Programs run one after another, so a read that comes *before* the other program's
write is seen only with the grid visited the other way round: DEEPKERN_INTERPRETER_ORDER=reverse.
"""

import os
import random

import numpy as np
import torch

_WINDOW = 48  # log2 of the bytes of fake address space that one argument gets
_FIRST = 1 << 8  # number of the first window: fake addresses start at 2^56, real ones end at 2^47
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class InterpreterMemoryError(IndexError):
    """A kernel accessed memory outside, or misaligned in, the tensors of its launch."""


class InterpreterRaceError(RuntimeError):
    """The outcome of a launch depends on the order in which its programs run."""


def tensors(name, arg):
    """The tensors inside a kernel argument, each with what to call it."""
    if isinstance(arg, tuple):
        for i, item in enumerate(arg):
            yield from tensors(f"{name}[{i}]", item)
    elif hasattr(arg, "data_ptr"):
        yield name, arg
    elif hasattr(arg, "block_shape") and hasattr(arg, "base"):  # a host TensorDescriptor
        yield name, arg.base


class Space:
    """The window of one tensor argument: where it is, how far it reaches, its bytes."""

    def __init__(self, number, name, tensor):
        tensor = getattr(tensor, "base", tensor)  # triton.reinterpret wraps the tensor
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.name, self.tensor = name, tensor
        self.real = tensor.data_ptr()
        self.nbytes = reach * tensor.element_size() if tensor.numel() else 0
        # Low bits as in the real address, so that alignment is what it was. The middle is not met
        # exactly, lest a round offset (2^48, say) lead from one tensor to the next.
        middle = (1 << _WINDOW - 1) + (number << _WINDOW - 16) % (1 << _WINDOW - 2)
        self.fake = (_FIRST + number << _WINDOW) + middle + self.real % 4096
        storage = tensor.untyped_storage()
        self.storage, self.storage_nbytes = storage.data_ptr(), storage.nbytes()
        self.start = tensor.storage_offset() * tensor.element_size()
        whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.bytes = whole[self.start : self.start + self.nbytes]
        self._views = {}

    def view(self, size):
        """The argument's memory as unsigned integers of `size` bytes."""
        if size not in self._views:
            whole = self.bytes[: self.nbytes // size * size]
            self._views[size] = whole.view(_UINT[size])
        return self._views[size]


class Launch:
    """What the checks know about the launch that is running."""

    current = None

    def __init__(self, kernel):
        self.kernel = kernel
        self.spaces = []
        self.by_tensor = {}  # id of the host tensor -> its space
        self.shadows = {}  # storage -> (bytes per entry, 1 + the program that wrote the entry)
        self.grid, self.program, self.order = (1, 1, 1), 0, None
        self.synced = None  # 1 + program -> whether it has performed an ordering atomic
        self.watching = True

    def add(self, name, arg):
        """Give every tensor inside a kernel argument its window."""
        for part, tensor in tensors(name, arg):
            self.by_tensor[id(tensor)] = Space(len(self.spaces), part, tensor)
            self.spaces.append(self.by_tensor[id(tensor)])

    def start(self, grid):
        self.grid = grid
        count = grid[0] * grid[1] * grid[2]
        self.synced = np.zeros(count + 1, dtype=bool)
        how = os.environ.get("DEEPKERN_INTERPRETER_ORDER", "")
        if how == "reverse":
            self.order = range(count - 1, -1, -1)
        elif how.startswith("random:"):
            self.order = random.Random(int(how[7:])).sample(range(count), count)
        elif how:
            raise ValueError(f"DEEPKERN_INTERPRETER_ORDER={how!r}: expected reverse or random:SEED")

    def visit(self, x, y, z):
        """The program to run when the grid loop has come to (x, y, z)."""
        _, ny, nz = self.grid
        self.program = (x * ny + y) * nz + z
        if self.order is not None:
            self.program = self.order[self.program]
        return self.coordinates(self.program)

    def coordinates(self, program):
        _, ny, nz = self.grid
        return program // (ny * nz), program // nz % ny, program % nz

    # Finding what is accessed

    def locate(self, pointers, mask, size, what):
        """Split an access into [(space, byte offsets, lanes)], checked; lanes None = all of them.

        `mask` None or boolean; masked-off lanes of a whole-tile answer may point anywhere, and
        are the caller's to leave alone.
        """
        space = self._space(int(pointers.flat[0])) if pointers.size else None
        if space is not None:
            offsets = (pointers - np.uint64(space.fake)).view(np.int64)
            if offsets.min() >= 0 and offsets.max() + size <= space.nbytes:
                low_bits = np.bitwise_or.reduce(offsets, axis=None) | space.real
                if low_bits & (size - 1):
                    self._check(space, pointers, offsets.ravel(), mask, size, what)
                return [(space, offsets, None)]
        lanes = np.arange(pointers.size) if mask is None else np.flatnonzero(mask)
        flat = pointers.ravel()[lanes]
        parts = []
        for window in np.unique(flat >> np.uint64(_WINDOW)):
            member = flat >> np.uint64(_WINDOW) == window
            address = int(flat[member][0])
            space = self._space(address)
            offsets = None
            if space is not None:
                offsets = (flat[member] - np.uint64(space.fake)).view(np.int64)
            else:
                space, offsets = self._loaded(flat[member], what)
            self._check(space, pointers, offsets, None, size, what, lanes[member])
            parts.append((space, offsets, lanes[member]))
        return parts

    def _space(self, address):
        number = (address >> _WINDOW) - _FIRST
        return self.spaces[number] if 0 <= number < len(self.spaces) else None

    def _loaded(self, addresses, what):
        """A pointer that came out of memory (a table of data_ptr values) is a real address."""
        for space in self.spaces:
            offsets = (addresses - np.uint64(space.real)).view(np.int64)
            if space.nbytes and offsets.min() >= 0 and offsets.max() < space.nbytes:
                return space, offsets
        raise InterpreterMemoryError(
            f"{self._where(what)} address {int(addresses[0]):#x}, which was not made from an "
            "argument of this launch. (A pointer loaded from memory works only if the tensor that "
            "it points to is an argument as well.)"
        )

    def _check(self, space, pointers, offsets, mask, size, what, lanes=None):
        outside = (offsets < 0) | (offsets + size > space.nbytes)
        bad = outside | (offsets + space.real & (size - 1) != 0)
        if mask is not None:
            bad &= np.ravel(mask)
        if not bad.any():
            return
        at = int(np.flatnonzero(bad)[0])
        lane = np.unravel_index(at if lanes is None else int(lanes[at]), pointers.shape)
        byte, limit = int(offsets[at]), space.nbytes // size
        why = f"outside [0, {limit})" if outside[at] else f"misaligned for {size}-byte elements"
        raise InterpreterMemoryError(
            f"{self._where(what)} argument '{space.name}' at element offset {byte // size} "
            f"(byte {byte}), {why}: {space.tensor.dtype} tensor of shape "
            f"{tuple(space.tensor.shape)} and strides {tuple(space.tensor.stride())}; "
            f"lane {tuple(map(int, lane))} of a tile of shape {pointers.shape}, "
            f"{int(bad.sum())} lanes bad"
        )

    def _where(self, what):
        return f"kernel '{self.kernel}', program {self.coordinates(self.program)}: {what}"

    # Races

    def _cells(self, space, offsets, size):
        """The shadow of a storage, and the entries in it of elements at `offsets`."""
        if space.storage not in self.shadows:
            entries = -(-space.storage_nbytes // size)
            self.shadows[space.storage] = size, np.zeros(entries, dtype=np.int32)
        unit, shadow = self.shadows[space.storage]
        if size < unit:
            shadow = np.repeat(shadow, unit // size)
            self.shadows[space.storage] = unit, shadow = size, shadow
        cells = offsets + space.start >> unit.bit_length() - 1
        if size > unit:
            cells = cells[..., None] + np.arange(size // unit)
        return shadow, cells

    def _foreign(self, writer):
        """Which of the elements last written by `writer` another, unordered program wrote."""
        foreign = (writer != 0) & (writer != self.program + 1)
        if self.synced[self.program + 1]:
            foreign &= ~self.synced[writer]
        return foreign

    def before_read(self, space, offsets, size, what="load of"):
        if space.storage not in self.shadows or not self.watching:
            return
        shadow, cells = self._cells(space, offsets, size)
        writer = shadow.take(cells, mode="clip")
        foreign = self._foreign(writer)
        if foreign.any():
            at = np.unravel_index(int(np.flatnonzero(foreign)[0]), foreign.shape)
            element = int(offsets[at[: offsets.ndim]]) // size
            raise InterpreterRaceError(
                f"{self._where(what)} argument '{space.name}' at element offset {element}, which "
                f"program {self.coordinates(int(writer[at]) - 1)} of the same launch wrote; "
                "nothing orders the two"
            )

    def write(self, space, offsets, size, values):
        """Store bits `values` at `offsets` (1-d), keeping the record of who wrote what."""
        memory, index = space.view(size), offsets >> size.bit_length() - 1
        if not self.watching:
            memory[index] = values
            return
        shadow, cells = self._cells(space, offsets, size)
        writer = shadow[cells]
        foreign = self._foreign(writer)
        if foreign.any():
            differs = memory[index] != values
            bad = foreign & (differs if foreign.ndim == 1 else differs[:, None])
            if bad.any():
                lane = int(np.argwhere(bad)[0][0])
                other = self.coordinates(int(writer[tuple(np.argwhere(bad)[0])]) - 1)
                old, new = int(memory[index[lane]]), int(values[lane])
                self._clash(space, int(index[lane]), other, old, new, size)
        memory[index] = values
        shadow[cells] = self.program + 1
        clash = memory[index] != values
        if clash.any():
            lane = int(np.flatnonzero(clash)[0])
            old, new = int(values[lane]), int(memory[index[lane]])
            self._clash(space, int(index[lane]), None, old, new, size)

    def _clash(self, space, element, other, old, new, size):
        who = "two lanes of this store" if other is None else f"program {other} and this one"
        dtype = space.tensor.dtype
        shown = f"{old:#x} and {new:#x}"
        if dtype.itemsize == size:
            bits = torch.from_numpy(np.array([old, new], dtype=_UINT[size])).view(dtype)
            shown += f" ({bits[0].item()} and {bits[1].item()} as {dtype})"
        raise InterpreterRaceError(
            f"{self._where('store to')} argument '{space.name}' at element offset {element}: "
            f"{who} write different values, {shown}"
        )
