"""A CUDA device without a card: tensors that say `cuda` and hold no numbers, `torch.cuda` answered by a stand-in.

Import this module before torch, and in a process of its own: it cannot be undone. On `Card` tensors have devices,
dtypes, shapes and storages, and every mixture of devices that a GPU refuses is refused. Small integers (masks, ids,
lengths) have values too, kept beside them on the CPU, because what the code does depends on them.
"""

import ctypes
import importlib.util
import subprocess
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("card.cpp")
GIB = 2**30
MOST_VALUES = 2**20
"""Numbers of a tensor that is still computed on the side."""
UNKNOWN = 0.25
"""What a number that nobody computed counts as where the code reads it (a loss, a norm)."""


def build(folder: Path) -> Path:
    """Compiles `card.cpp` into `folder`. A few seconds; needs g++."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # pyright: ignore
    library = folder / "libcard.so"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", f"-I{torch_folder / 'include'}", str(SOURCE)]
    command += ["-o", str(library), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def load(library: str) -> None:
    """Registers the device; torch looks for it once, when it is imported."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # pyright: ignore
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


class OutOfMemory(RuntimeError):
    """More than the card has."""


class Memory:
    """What is on one card: the trainer's tensors, what its allocator keeps of freed ones, and the engine's part.

    `reserved` never falls by itself: what torch frees stays with the process until `empty_cache`, and an engine in
    another process cannot have it.
    """

    def __init__(self, total: int, contexts: int) -> None:
        self.total, self.contexts = total, contexts
        self.sizes: dict[int, int] = {}
        self.allocated = self.reserved = self.peak = 0
        self.engine: dict[str, int] = {}
        self.counts = True

    @property
    def free(self) -> int:
        return self.total - self.contexts - self.reserved - sum(self.engine.values())

    def note(self, storage: Any) -> None:
        """Counts a storage, or its new size."""
        if not self.counts:
            return
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
        self.allocated += storage.nbytes() - self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated)
        if self.free < 0:
            raise OutOfMemory(f"trainer {self.reserved / GIB:.1f} GiB, engine {self.engine}")

    def _forget(self, key: int) -> None:
        self.allocated -= self.sizes.pop(key, 0)

    def take(self, name: str, size: int) -> None:
        """An engine allocates. Raises OutOfMemory."""
        assert name not in self.engine, f"{name} twice"
        if size > self.free:
            raise OutOfMemory(f"{name}: {size / GIB:.1f} GiB wanted, {self.free / GIB:.1f} GiB free")
        self.engine[name] = size

    def give(self, name: str) -> None:
        """An engine frees."""
        del self.engine[name]

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def reset_peak(self) -> None:
        self.peak = self.allocated


class Stream:
    """A queue of a device on which everything is done at once."""

    device_index = device = 0
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "Event":
        return event or Event()

    def synchronize(self) -> None: ...

    def is_capturing(self) -> bool:
        return False


class Event:
    """A point in such a queue."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Properties:
    """Of the card of a rank."""

    major, minor, multi_processor_count, name = 9, 0, 132, "fake card"

    def __init__(self, uuid: str, total: int) -> None:
        self.uuid, self.total_memory = uuid, total


def plug_in(memory: Memory, uuid: Callable[[], str], log: Callable[..., None]) -> None:
    """Puts the stand-in for `torch.cuda` in place."""
    import torch

    stream = Stream()

    def empty_cache() -> None:
        memory.empty_cache()
        log("empty_cache")

    torch.cuda.is_available = lambda: True
    torch.cuda.is_initialized = lambda: True
    torch.cuda._lazy_init = lambda: None
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.device = lambda device: nullcontext()  # pyright: ignore
    torch.cuda.get_device_properties = lambda device=None: Properties(uuid(), memory.total)  # pyright: ignore
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.Stream = Stream  # pyright: ignore
    torch.cuda.Event = Event  # pyright: ignore
    torch.cuda.stream = lambda stream: nullcontext()  # pyright: ignore
    torch.cuda.current_stream = lambda device=None: stream  # pyright: ignore
    torch.cuda.default_stream = lambda device=None: stream  # pyright: ignore
    torch.cuda.set_stream = lambda stream: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = empty_cache
    torch.cuda.ipc_collect = lambda: None
    torch.cuda.memory_allocated = lambda device=None: memory.allocated
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.manual_seed_all = lambda seed: None
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.current_stream = lambda device=None: stream  # pyright: ignore


def patch_fsdp(memory: Memory) -> None:
    """Lets fake tensors say where FSDP2 has moved them, and leaves out of the count what DTensor makes to learn shapes."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    move, propagate = _fsdp_init._move_states_to_device, ShardingPropagator._propagate_tensor_meta_non_cached

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


def resized(memory: Memory, on_card: Callable[[Any], bool]) -> None:
    """Lets `memory` know when FSDP2 frees gathered parameters and takes room for them again."""
    import torch

    resize = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> None:
        resize(storage, size)
        if on_card(storage):
            memory.note(storage)

    torch.UntypedStorage.resize_ = resize_  # pyright: ignore


def card_mode(memory: Memory, log_collective: Callable[[str, list[Any]], None]) -> Any:
    """The mode under which tensors are on the card: fake ones, the small integers among them with values."""
    import torch
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.utils._pytree import tree_flatten, tree_unflatten

    torch.autograd.set_multithreading_enabled(False)  # a thread of its own would not be in the mode
    plain = (torch.Tensor, torch.nn.Parameter, FakeTensor)
    tensors_on_card: set[int] = set()

    class CardMode(FakeTensorMode):
        """FakeTensorMode with values, with a count of what is on the card, and a list of collectives."""

        def __init__(self) -> None:
            super().__init__(allow_non_fake_inputs=True)
            self.stale: dict[int, Any] = {}
            """Storages of values that were overwritten by what has none, by address; kept, so that none is used again."""

        @property
        def avoid_device_init(self) -> bool:
            """Nothing is made on the device itself, not even by `torch.tensor(1, device="cuda")`."""
            return True

        def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            flat, spec = tree_flatten((args, kwargs))
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
            if any(type(t) not in plain for t in tensors):
                return super().dispatch(func, types, args, kwargs)
            if func.namespace in ("c10d", "_c10d_functional"):
                log_collective(func._schema.name, tensors)
            if func._schema.name in ("aten::lift_fresh", "aten::lift"):  # of a number or list in the code
                return self._faked(args[0])
            if func._schema.name == "aten::_pin_memory":
                return super().dispatch(torch.ops.aten.clone.default, types, args[:1])
            flat = [self._faked(x) if isinstance(x, torch.Tensor) else x for x in flat]
            args, kwargs = tree_unflatten(flat, spec)
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
            values = self._values(func, flat, tensors)
            try:
                out = super().dispatch(func, types, args, kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                out = self._from_values(func, flat, values, spec)
                values = None
            self._count(out)
            return self._with_values(func, flat, values, spec, out, tensors)

        def _faked(self, tensor: Any) -> Any:
            """A tensor of the mode for a real one, which is its value."""
            if isinstance(tensor, FakeTensor):
                return tensor
            fake = self.fake_tensor_converter.from_real_tensor(self, tensor)
            if tensor.device.type == "cpu" and tensor.numel() <= MOST_VALUES:
                fake.value = tensor.detach()  # pyright: ignore
            return fake

        def value(self, tensor: Any) -> Any:
            found = getattr(tensor, "value", None)
            return None if found is None or found.untyped_storage()._cdata in self.stale else found

        def _values(self, func: Any, flat: list[Any], tensors: list[Any]) -> list[Any] | None:
            """The arguments with values on the CPU in place of tensors; None where one has no value."""
            if not tensors and not (func.namespace in ("aten", "prims") and factory(func, flat)):
                return None
            if func.namespace in ("c10d", "_c10d_functional") or "empty" in func._schema.name:
                return None
            found = [self.value(x) if isinstance(x, torch.Tensor) else x for x in flat]
            if any(x is None and isinstance(y, torch.Tensor) for x, y in zip(found, flat, strict=True)):
                return None
            return [torch.device("cpu") if isinstance(x, torch.device) else x for x in found]

        def _from_values(self, func: Any, flat: list[Any], values: list[Any] | None, spec: Any) -> Any:
            """The result of an operation that depends on values. A number without one is UNKNOWN."""
            name = func._schema.name
            if values is None:
                if name == "aten::_local_scalar_dense" and flat[0].is_floating_point():
                    return UNKNOWN
                raise RuntimeError(f"{name} depends on values that nobody computed: {[x for x in flat]}")
            real = self._compute(func, values, spec)
            if not isinstance(real, torch.Tensor):
                return real
            device = next(x.device for x in flat if isinstance(x, torch.Tensor))
            with self:
                out = torch.empty(real.shape, dtype=real.dtype, device=device)
            out.value = real  # pyright: ignore
            return out

        def _compute(self, func: Any, values: list[Any], spec: Any) -> Any:
            args, kwargs = tree_unflatten(values, spec)
            with torch._C._DisableTorchDispatch(), torch.no_grad():
                return func(*args, **kwargs)

        def _with_values(
            self, func: Any, flat: list[Any], values: list[Any] | None, spec: Any, out: Any, tensors: list[Any]
        ) -> Any:
            written = [a for a, s in zip(tree_args(flat, spec), func._schema.arguments, strict=False) if writes(s)]
            if values is None:
                for tensor in written:
                    found = getattr(tensor, "value", None)
                    if found is not None:
                        storage = found.untyped_storage()
                        self.stale[storage._cdata] = storage
                        tensor.value = None
                return out
            outs = [x for x in tree_flatten(out)[0] if isinstance(x, FakeTensor)]
            if not outs or any(x.numel() > MOST_VALUES for x in outs):
                return out
            real = tree_flatten(self._compute(func, values, spec))[0]
            for fake, value in zip(outs, [x for x in real if isinstance(x, torch.Tensor)], strict=True):
                assert fake.shape == value.shape, f"{func}: {fake.shape} {value.shape}"
                fake.value = value  # pyright: ignore
            return out

        def _count(self, out: Any) -> None:
            for x in tree_flatten(out)[0]:
                if isinstance(x, FakeTensor) and x.device.type == "cuda":
                    storage = x.untyped_storage()
                    if storage._cdata not in tensors_on_card:
                        tensors_on_card.add(storage._cdata)
                        weakref.finalize(storage, tensors_on_card.discard, storage._cdata)
                    memory.note(storage)

    def tree_args(flat: list[Any], spec: Any) -> tuple[Any, ...]:
        return tree_unflatten(flat, spec)[0]

    def writes(argument: Any) -> bool:
        return argument.alias_info is not None and argument.alias_info.is_write

    def factory(func: Any, flat: list[Any]) -> bool:
        """Whether the operation makes a tensor whose values are known."""
        return func._schema.name.split("::")[1] in ("arange", "zeros", "ones", "full", "scalar_tensor")

    def numpy(tensor: Any, *_: Any, **__: Any) -> Any:
        if tensor.device.type != "cpu":
            raise TypeError("a tensor on cuda cannot be converted to numpy")
        with torch._C._DisableTorchDispatch():
            return mode.value(tensor).numpy()

    FakeTensor.numpy = numpy  # pyright: ignore
    mode = CardMode()
    patch_fsdp(memory)
    resized(memory, lambda storage: storage._cdata in tensors_on_card)
    return mode
