"""How a method of a worker is called on all ranks.

A mode says what each rank gets, and what the driver gets back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from verl.protocol import DataProto

ATTRIBUTE = "registered"


class Dispatch(StrEnum):
    """The three ways in which the trainer calls its workers."""

    ONE_TO_ALL = "one_to_all"  # the same arguments to every rank; a list of results
    DP_COMPUTE_PROTO = "dp_compute_proto"  # rows split over the ranks; their rows concatenated
    # rows split over the ranks; the result of rank 0, which the ranks have reduced already
    DP_COMPUTE_METRIC = "dp_compute_metric"


@dataclass(frozen=True)
class Registered:
    """How one method is called, and which columns of a batch it reads."""

    mode: Dispatch
    columns: tuple[str, ...] = ()
    """Columns that every batch must have."""
    optional: tuple[str, ...] = ()
    """Columns that are sent where the batch has them."""

    def select(self, method: str, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments, each batch among them with only the columns that the method reads.

        Raises KeyError naming `method` and the columns that a batch lacks.
        """
        return tuple(
            self._select(method, arg) if isinstance(arg, DataProto) else arg for arg in args
        )

    def _select(self, method: str, data: DataProto) -> DataProto:
        missing = [name for name in self.columns if name not in data.batch]
        if missing:
            raise KeyError(
                f"{method} reads the column(s) {', '.join(missing)}, which the batch does not "
                f"have; it has {', '.join(data.batch)}"
            )
        present = [name for name in self.optional if name in data.batch]
        return data.select([*self.columns, *present])


def register(
    dispatch_mode: Dispatch, columns: Sequence[str] = (), optional: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a method of a Worker as callable from the driver through a RayWorkerGroup.

    A method that gets rows names the tensor columns that it reads; nothing else of the batch is
    sent to the ranks. `optional` columns may be missing. Raises TypeError for a method that gets
    rows and names no column.
    """
    if dispatch_mode is not Dispatch.ONE_TO_ALL and not columns:
        raise TypeError(
            f"a method registered as {dispatch_mode} must name the columns that it reads"
        )

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        setattr(method, ATTRIBUTE, Registered(dispatch_mode, tuple(columns), tuple(optional)))
        return method

    return mark


def registered(cls: type) -> dict[str, Registered]:
    """The registered methods of a class, by name."""
    members = {name: getattr(cls, name) for name in dir(cls)}
    return {
        name: getattr(member, ATTRIBUTE)
        for name, member in members.items()
        if hasattr(member, ATTRIBUTE)
    }


def dispatch(mode: Dispatch, world_size: int, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments of each rank.

    A DataProto is split by `meta_info["rank_sizes"]` if present (rows are ordered by rank), else as
    evenly as possible. Ranks may get different numbers of rows, or none.
    """
    if mode is Dispatch.ONE_TO_ALL:
        return [args] * world_size
    split = [
        _split(arg, world_size) if isinstance(arg, DataProto) else [arg] * world_size
        for arg in args
    ]
    return list(zip(*split, strict=True))


def _split(data: DataProto, world_size: int) -> list[DataProto]:
    sizes = data.meta_info.get("rank_sizes")
    return (
        data.split(sizes)
        if sizes is not None and len(sizes) == world_size
        else data.chunk(world_size)
    )


def collect(mode: Dispatch, results: list[Any]) -> Any:
    """What the driver gets from the results of all ranks."""
    if mode is Dispatch.DP_COMPUTE_PROTO:
        return DataProto.concat([r for r in results if len(r)])
    return results[0] if mode is Dispatch.DP_COMPUTE_METRIC else results
