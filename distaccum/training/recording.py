"""Records how tensors without memory are made, and makes them with memory later, one after another.

On the meta device a tensor has a shape and no numbers. A recording notes each operation on such tensors, in order. The
replay runs the operations on the CPU. Random numbers are drawn in the recorded order, so they are those that a
construction on the CPU would have got; all else is done tensor by tensor, so that few of them are whole at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_CPU, _META = torch.device("cpu"), torch.device("meta")
_FILLS = frozenset(
    getattr(_aten, f"{name}_")
    for name in ("fill", "zero", "copy", "normal", "uniform", "random", "exponential", "log_normal", "cauchy")
)
"""Operations that write a tensor without reading it."""
_EMPTY = frozenset((_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided))
_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device)
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)

Take = Callable[[Tensor], None]


class NotRecordableError(Exception):
    """Something was done that can't be done later; the message is the reason."""


@dataclass(frozen=True, slots=True)
class View:
    """Says where a tensor lies: the number of its memory in the recording, and how it is laid out there."""

    memory: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class _Operation:
    """An operation and its arguments, with a `View` in the place of each deferred tensor.

    Attributes:
        results: views of the deferred tensors that it returns, in order.
        reads, writes, makes: numbers of the memory that it reads, changes, and allocates for its results.
        overwrites: the one memory in which it leaves nothing as it was; None if there is none.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[View, ...]
    reads: frozenset[int]
    writes: frozenset[int]
    makes: frozenset[int]
    overwrites: int | None

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.function.tags

    @property
    def touches(self) -> frozenset[int]:
        return self.reads | self.writes | self.makes


@contextmanager
def recorded() -> Iterator[Recording]:
    """Makes tensors on the meta device unless another one is named, and records what is done to them.

    Raises:
        NotRecordableError: what is done depends on random numbers, or draws them in a way that can't be repeated.
    """
    recording = Recording()
    with torch.device("meta"), _Constants(), _Recorder(recording):
        yield recording
    recording.require_same_generator()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # else the modes beside this one would see what it does itself
            return self._recording.run(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """Keeps the numbers of tensors that are made from values, which the meta device drops before they can be seen.

    And hides that tensors are without numbers, as some functions of `torch.nn.init` do nothing then.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_META:
            return False
        if func is torch.Tensor.new:
            raise NotRecordableError("it calls Tensor.new")
        if kwargs.get("device") is None:
            if func is torch.Tensor.new_tensor and args[0].device == _META:
                func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, **kwargs}
            if func in _FROM_VALUES and not any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
                requires_grad = kwargs.pop("requires_grad", False)
                return func(*args, **{**kwargs, "device": "cpu"}).to("meta").requires_grad_(requires_grad)
        return func(*args, **kwargs)


class Recording:
    """The operations on deferred tensors, in order."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []
        self._numbers: dict[int, int] = {}
        self._memory: list[torch.UntypedStorage] = []  # kept, so that none gets the address of another one
        self._written: set[int] = set()
        self._generator = torch.default_generator.get_state()

    def require_same_generator(self) -> None:
        """Refuses a generator that was seeded, or drawn from, by something that is not recorded.

        Raises:
            NotRecordableError: its state is not the one at the recording's start.
        """
        if not torch.equal(torch.default_generator.get_state(), self._generator):
            raise NotRecordableError("it seeds torch's generator, or draws from it for a tensor on the CPU")

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation, and records it if it is one on the meta device that does anything to numbers.

        Raises:
            NotRecordableError: it can't be done later.
        """
        leaves = tree_leaves((args, kwargs))
        deferred = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_meta]
        if not deferred and _META not in leaves:
            return function(*args, **kwargs)
        packet = getattr(function, "overloadpacket", None)
        if deferred and packet is _aten._local_scalar_dense:
            return function(self._value_of(deferred[0]))
        if deferred and packet is _aten._to_copy and (kwargs.get("device") or _META) != _META:
            return function(self._value_of(deferred[0]), **kwargs)
        # Before it runs, as it may change how a tensor lies in its memory.
        given, named = tree_map(self._described, args), tree_map(self._described, kwargs)
        written = _written_arguments(function, args, kwargs)
        is_fill = packet in _FILLS
        reads = frozenset(self.view_of(t).memory for t in deferred if not (is_fill and t is written[0]))
        writes = frozenset(self.view_of(t).memory for t in written)
        overwrites = next(iter(writes)) if is_fill and _is_whole(written[0]) else None
        known = len(self._memory)
        result = function(*args, **kwargs)
        returned = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        results = tuple(self.view_of(tensor, may_be_new=True) for tensor in returned)
        makes = frozenset(range(known, len(self._memory)))
        if makes or writes:  # else it has returned a view
            operation = _Operation(function, given, named, results, reads, writes, makes, overwrites)
            if operation.is_random:
                self.require_same_generator()
            self._operations.append(operation)
            self._written |= writes if packet in _EMPTY else writes | makes
        return result

    def view_of(self, tensor: Tensor, *, may_be_new: bool = False) -> View:
        """Returns where a deferred tensor lies.

        Raises:
            NotRecordableError: it was not made under the recording, or is of a kind that has no plain memory.
        """
        if not tensor.is_meta or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise NotRecordableError("it makes a tensor that is sparse, or a conjugate, or writes to one on the CPU")
        memory = tensor.untyped_storage()
        number = self._numbers.get(memory._cdata)
        if number is None:
            if not may_be_new:
                raise NotRecordableError("it uses a tensor of the meta device that was made elsewhere")
            number = self._numbers[memory._cdata] = len(self._memory)
            self._memory.append(memory)
        return View(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def is_written(self, view: View) -> bool:
        """Whether anything was written to a tensor's memory."""
        return view.memory in self._written

    def _described(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            # What has numbers may change before they are used.
            return self.view_of(leaf) if leaf.is_meta else leaf.detach().clone()
        if isinstance(leaf, torch.Generator):
            raise NotRecordableError("it draws from a generator of its own")
        if not isinstance(leaf, _PLAIN):
            raise NotRecordableError(f"it calls an operation of tensors with a {type(leaf).__name__}")
        return _CPU if leaf == _META else leaf

    def _value_of(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor at this point of the recording."""
        view = self.view_of(tensor)
        steps = _needed(self._operations, {view.memory}, draws=False)
        if any(step.operation.is_random for step in steps):
            raise NotRecordableError("what it does depends on the values of random numbers")
        workshop = _Workshop(self._memory)
        for step in steps:
            workshop.run(step.operation)
        return workshop.tensor(view)

    @torch.no_grad()
    def replay(self, wanted: Iterable[tuple[View, Take]]) -> None:
        """Makes tensors, and hands each to its function as soon as it has its last numbers.

        Leaves torch's generator as a construction on the CPU would have left it.

        Args:
            wanted: where a tensor lies, and what takes it: whole, on the CPU, and not to be kept.
        """
        takers: dict[int, list[tuple[View, Take]]] = defaultdict(list)
        for view, take in wanted:
            takers[view.memory].append((view, take))
        torch.default_generator.set_state(self._generator)
        _replay(_needed(self._operations, set(takers)), _Workshop(self._memory), takers)


def _written_arguments(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    schema = getattr(function, "_schema", None)
    if schema is None:
        raise NotRecordableError(f"it calls {function}, which is no single operation")
    given = [*args, *(kwargs.get(argument.name) for argument in schema.arguments[len(args) :])]
    pairs = zip(schema.arguments, given, strict=True)
    written = [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor covers its memory, each number once."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation to replay. Aside: for the random numbers that it draws alone, as nothing reads what it writes."""

    operation: _Operation
    is_aside: bool


def _needed(operations: Sequence[_Operation], wanted: set[int], *, draws: bool = True) -> list[_Step]:
    """The operations that the final numbers of some memory depend on.

    Args:
        draws: with all those that draw random numbers.
    """
    live, steps = set(wanted), []
    for operation in reversed(operations):
        is_live = not live.isdisjoint(operation.writes | operation.makes)
        if not is_live and not (draws and operation.is_random):
            continue
        is_aside = not is_live and not operation.reads
        if not is_aside:
            live -= operation.makes
            live.discard(operation.overwrites)
            live |= operation.reads
        steps.append(_Step(operation, is_aside))
    return steps[::-1]


class _Workshop:
    """Memory on the CPU in the place of deferred memory, allocated when it is first used."""

    def __init__(self, deferred: Sequence[torch.UntypedStorage]) -> None:
        self._deferred = deferred
        self._memory: dict[int, torch.UntypedStorage] = {}

    def tensor(self, view: View) -> Tensor:
        if view.memory not in self._memory:
            num_bytes = self._deferred[view.memory].nbytes()
            self._memory[view.memory] = torch.empty(num_bytes, dtype=torch.uint8, device=_CPU).untyped_storage()
        empty = torch.empty(0, dtype=view.dtype, device=_CPU)
        return empty.set_(self._memory[view.memory], view.offset, view.shape, view.stride)

    def free(self, memory: int) -> None:
        self._memory.pop(memory, None)

    def run(self, operation: _Operation) -> None:
        returned = self._called(operation, self.tensor)
        for view, result in zip(operation.results, returned, strict=True):
            if view.memory not in operation.makes:
                continue
            is_alike = (result.stride(), result.storage_offset()) == (view.stride, view.offset)
            if is_alike and result.untyped_storage().nbytes() == self._deferred[view.memory].nbytes():
                self._memory[view.memory] = result.untyped_storage()
            else:  # laid out in another way on the CPU than on the meta device
                self.tensor(view).copy_(result)

    def run_aside(self, operation: _Operation) -> None:
        self._called(
            operation, lambda view: torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device=_CPU)
        )

    def _called(self, operation: _Operation, tensor_of: Callable[[View], Tensor]) -> list[Tensor]:
        def real(leaf: Any) -> Any:
            return tensor_of(leaf) if isinstance(leaf, View) else leaf

        found = operation.function(*tree_map(real, operation.args), **tree_map(real, operation.kwargs))
        return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _replay(steps: Sequence[_Step], workshop: _Workshop, takers: dict[int, list[tuple[View, Take]]]) -> None:
    """Runs steps: random ones in their order, and the others as soon as nothing random comes before them.

    Memory that operations connect is a group, whose steps stay in their order. Groups don't know of each other, so one
    whose last random numbers are drawn is finished, and its memory freed, before another one goes on.
    """
    group_of = _groups(step.operation.touches for step in steps if not step.is_aside)
    groups: dict[int, deque[_Step]] = defaultdict(deque)
    draws: Counter[int] = Counter()
    last: dict[int, _Step] = {}
    for step in steps:
        if not step.is_aside:
            groups[group_of(step.operation)].append(step)
            draws[group_of(step.operation)] += step.operation.is_random
            last |= dict.fromkeys(step.operation.touches, step)

    def run_next(group: deque[_Step]) -> _Step:
        step = group.popleft()
        workshop.run(step.operation)
        for memory in step.operation.touches:
            if last[memory] is step:
                hand_out(memory)
        return step

    def hand_out(memory: int) -> None:
        for view, take in takers.pop(memory, ()):
            take(workshop.tensor(view))
        workshop.free(memory)

    for step in steps:
        if step.is_aside:
            workshop.run_aside(step.operation)
        elif step.operation.is_random:
            number = group_of(step.operation)
            while run_next(groups[number]) is not step:
                pass
            draws[number] -= 1
            while not draws[number] and groups[number]:
                run_next(groups[number])
    for group in groups.values():
        while group:
            run_next(group)
    for memory in list(takers):
        hand_out(memory)  # nothing was ever written to it


def _groups(connected: Iterable[frozenset[int]]) -> Callable[[_Operation], int]:
    """Returns a function that gives the number of an operation's group (union-find)."""
    parent: dict[int, int] = {}

    def root(memory: int) -> int:
        while (above := parent.setdefault(memory, memory)) != memory:
            parent[memory] = memory = parent[above]  # halves the way for the next time
        return memory

    for touched in connected:
        first, *others = touched
        for other in others:
            parent[root(other)] = root(first)
    return lambda operation: root(next(iter(operation.touches)))
