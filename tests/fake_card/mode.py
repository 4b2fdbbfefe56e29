"""Tensors on a card that is not there.

They have devices, dtypes, shapes and storages, and every mixture of devices that a GPU refuses is
refused. Small ones whose numbers are known (masks, ids, lengths) have values too, kept beside them
on the CPU, because what the code does depends on them.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.fake_card.card import Memory

MOST_VALUES = 2**20
"""Numbers of a tensor that is still computed on the side."""
UNKNOWN = 0.25
"""What a number that nobody computed counts as where the code reads it (a loss, a norm)."""
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
COLLECTIVES = ("c10d", "_c10d_functional")
FACTORIES = ("arange", "zeros", "ones", "full", "scalar_tensor")
"""Operations that make a tensor whose values are known."""


class CardMode(FakeTensorMode):
    """FakeTensorMode with values, a count of what is on the card, and a list of collectives."""

    def __init__(self, memory: Memory, log_collective: Callable[[str, list[Any]], None]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.memory = memory
        self.log_collective = log_collective
        self.on_card: set[int] = set()
        """Storages on the card, by address."""
        self.stale: dict[int, Any] = {}
        """Storages of values that were overwritten by what has none, by address; kept, so that none
        is used again."""

    @property
    def avoid_device_init(self) -> bool:
        """Nothing is made on the device itself, not even by `torch.tensor(1, device="cuda")`."""
        return True

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if any(type(t) not in PLAIN for t in tensors):
            return super().dispatch(func, types, args, kwargs)
        name = func._schema.name
        if func.namespace in COLLECTIVES:
            self.log_collective(name, tensors)
        if name in ("aten::lift_fresh", "aten::lift"):  # of a number or list in the code
            return self._faked(args[0])
        if name == "aten::_pin_memory":
            return super().dispatch(torch.ops.aten.clone.default, types, args[:1])
        flat = [self._faked(x) if isinstance(x, torch.Tensor) else x for x in flat]
        args, kwargs = tree_unflatten(flat, spec)
        values = self._values(func, flat)
        try:
            out = super().dispatch(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = self._from_values(func, flat, values, spec)
            values = None
        self._count(out)
        return self._with_values(func, args, values, spec, out)

    def value(self, tensor: Any) -> Any:
        """The numbers of a fake tensor, None where nobody has computed them."""
        found = getattr(tensor, "value", None)
        return None if found is None or found.untyped_storage()._cdata in self.stale else found

    def _faked(self, tensor: Any) -> Any:
        """A tensor of the mode for a real one, which is its value."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake: Any = self.fake_tensor_converter.from_real_tensor(self, tensor)
        if tensor.device.type == "cpu" and tensor.numel() <= MOST_VALUES:
            fake.value = tensor.detach()
        return fake

    def _values(self, func: Any, flat: list[Any]) -> list[Any] | None:
        """The arguments with values on the CPU in place of tensors; None where one has no value."""
        name = func._schema.name.split("::")[1]
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if func.namespace in COLLECTIVES or "empty" in name or not (tensors or name in FACTORIES):
            return None
        if any(self.value(x) is None for x in tensors):
            return None
        found = [self.value(x) if isinstance(x, torch.Tensor) else x for x in flat]
        return [torch.device("cpu") if isinstance(x, torch.device) else x for x in found]

    def _from_values(self, func: Any, flat: list[Any], values: list[Any] | None, spec: Any) -> Any:
        """The result of an operation that depends on values. A number without one is UNKNOWN."""
        name = func._schema.name
        if values is None:
            if name == "aten::_local_scalar_dense" and flat[0].is_floating_point():
                return UNKNOWN
            raise RuntimeError(f"{name} depends on values that nobody computed: {flat}")
        real = self._compute(func, values, spec)
        if not isinstance(real, torch.Tensor):
            return real
        device = next(x.device for x in flat if isinstance(x, torch.Tensor))
        with self:
            out: Any = torch.empty(real.shape, dtype=real.dtype, device=device)
        out.value = real
        return out

    def _compute(self, func: Any, values: list[Any], spec: Any) -> Any:
        args, kwargs = tree_unflatten(values, spec)
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            return func(*args, **kwargs)

    def _with_values(
        self, func: Any, args: Any, values: list[Any] | None, spec: Any, out: Any
    ) -> Any:
        """`out` with its values, where those of the arguments are known.

        Else what was written to has none any more.
        """
        if values is None:
            for tensor, argument in zip(args, func._schema.arguments, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._forget(tensor)
            return out
        outs = [x for x in tree_flatten(out)[0] if isinstance(x, FakeTensor)]
        if not outs or any(x.numel() > MOST_VALUES for x in outs):
            return out
        real = [
            x
            for x in tree_flatten(self._compute(func, values, spec))[0]
            if isinstance(x, torch.Tensor)
        ]
        for fake, value in zip(outs, real, strict=True):
            assert fake.shape == value.shape, f"{func}: {fake.shape} {value.shape}"
            fake.value = value  # pyright: ignore
        return out

    def _forget(self, tensor: Any) -> None:
        found = getattr(tensor, "value", None)
        if found is not None:
            storage = found.untyped_storage()
            self.stale[storage._cdata] = storage
            tensor.value = None

    def _count(self, out: Any) -> None:
        for x in tree_flatten(out)[0]:
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                storage = x.untyped_storage()
                if storage._cdata not in self.on_card:
                    self.on_card.add(storage._cdata)
                    weakref.finalize(storage, self.on_card.discard, storage._cdata)
                self.memory.note(storage)


def put_in_place(mode: CardMode) -> None:
    """Lets torch work with such tensors where it looks below them."""
    torch.autograd.set_multithreading_enabled(False)  # a thread of its own would not be in the mode
    _numbers_on_the_host(mode)
    _sizes_of_storages(mode)
    _fsdp(mode.memory)


def _numbers_on_the_host(mode: CardMode) -> None:
    def numpy(tensor: Any, *_: Any, **__: Any) -> Any:
        if tensor.device.type != "cpu":
            raise TypeError("a tensor on cuda cannot be converted to numpy")
        with torch._C._DisableTorchDispatch():
            return mode.value(tensor).numpy()

    FakeTensor.numpy = numpy  # pyright: ignore


def _sizes_of_storages(mode: CardMode) -> None:
    """Counts what FSDP2 frees and takes again by resizing storages of gathered parameters."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> None:
        resize(storage, size)
        if storage._cdata in mode.on_card:
            mode.memory.note(storage)

    torch.UntypedStorage.resize_ = resize_  # pyright: ignore


def _fsdp(memory: Memory) -> None:
    """Lets fake tensors say where FSDP2 has moved them.

    What DTensor makes to learn shapes is on no card.
    """
    move = _fsdp_init._move_states_to_device
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def moved(parameters: list[Any], buffers: list[Any], device: Any) -> None:
        move(parameters, buffers, device)
        for tensor in (*parameters, *buffers):
            tensor.fake_device = device

    def propagated(*args: Any) -> Any:
        memory.counts = False
        try:
            return propagate(*args)
        finally:
            memory.counts = True

    _fsdp_init._move_states_to_device = moved
    ShardingPropagator._propagate_tensor_meta_non_cached = propagated  # pyright: ignore
