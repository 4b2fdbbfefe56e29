"""How a method of a worker is called on all ranks: what each rank gets, and what the driver gets back."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from verl.protocol import DataProto

ATTRIBUTE = "dispatch_mode"


class Dispatch(StrEnum):
    """The three ways in which the trainer calls its workers."""

    ONE_TO_ALL = "one_to_all"  # the same arguments to every rank; a list of results
    DP_COMPUTE_PROTO = "dp_compute_proto"  # rows split over the ranks; their rows concatenated
    DP_COMPUTE_METRIC = "dp_compute_metric"  # rows split over the ranks; the result of rank 0, already reduced there


def register(dispatch_mode: Dispatch) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a method of a Worker as callable from the driver through a RayWorkerGroup."""

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        setattr(method, ATTRIBUTE, dispatch_mode)
        return method

    return mark


def dispatch(mode: Dispatch, world_size: int, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments of each rank.

    A DataProto is split by `meta_info["rank_sizes"]` if present (rows are ordered by rank), else as evenly as possible;
    ranks may get unequal numbers of rows, also none.
    """
    if mode is Dispatch.ONE_TO_ALL:
        return [args] * world_size
    split = [_split(arg, world_size) if isinstance(arg, DataProto) else [arg] * world_size for arg in args]
    return list(zip(*split, strict=True))


def _split(data: DataProto, world_size: int) -> list[DataProto]:
    sizes = data.meta_info.get("rank_sizes")
    return data.split(sizes) if sizes is not None and len(sizes) == world_size else data.chunk(world_size)


def collect(mode: Dispatch, results: list[Any]) -> Any:
    """What the driver gets from the results of all ranks."""
    if mode is Dispatch.DP_COMPUTE_PROTO:
        return DataProto.concat([r for r in results if len(r)])
    return results[0] if mode is Dispatch.DP_COMPUTE_METRIC else results
