"""A CUDA device without a card.

Tensors say `cuda` and hold no numbers, and a stand-in answers `torch.cuda`. `load` comes before the
import of torch, and in a process of its own: it cannot be undone. `mode` has the tensors.
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


def build(folder: Path) -> Path:
    """Compiles `card.cpp` into `folder`. A few seconds; needs g++."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # pyright: ignore
    library = folder / "libcard.so"
    command = [
        "g++",
        "-shared",
        "-fPIC",
        "-std=c++20",
        "-O0",
        f"-I{torch_folder / 'include'}",
        str(SOURCE),
    ]
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
    """The trainer's tensors on one card, what its allocator keeps, and the engine's part.

    `reserved` never falls by itself: what torch frees stays with the process until `empty_cache`,
    and an engine in another process cannot have it.
    """

    def __init__(self, total: int, contexts: int) -> None:
        self.total = total
        self.contexts = contexts
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
            raise OutOfMemory(
                f"{name}: {size / GIB:.1f} GiB wanted, {self.free / GIB:.1f} GiB free"
            )
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

    major = 9
    minor = 0
    multi_processor_count = 132
    name = "fake card"

    def __init__(self, uuid: str, total: int) -> None:
        self.uuid = uuid
        self.total_memory = total


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
    torch.cuda.max_memory_allocated = lambda device=None: memory.peak
    torch.cuda.max_memory_reserved = lambda device=None: memory.reserved
    # the rehearsal takes the peak after every call itself
    torch.cuda.reset_peak_memory_stats = lambda device=None: None
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.manual_seed_all = lambda seed: None
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.current_stream = lambda device=None: stream  # pyright: ignore
