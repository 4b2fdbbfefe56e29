"""Ray within one process, for the few calls that `verl.single_controller.worker_group` makes.

A method of a plain class runs at once; a coroutine runs on one loop, in a thread of its own. The
handle of an object that died raises what Ray raises.
"""

import asyncio
import inspect
import threading
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError


class Call:
    """What `handle.method.remote()` gives: waited for by `get`, or awaited."""

    def __init__(self, future: "Future[Any]") -> None:
        self.future = future

    def __await__(self) -> Any:
        return asyncio.wrap_future(self.future).__await__()


class Handle:
    """An object as an actor."""

    def __init__(self, cluster: "Cluster", target: Any) -> None:
        self._cluster = cluster
        self._target = target
        self._open = set()
        self._dead = False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args, **kwargs: self._call(name, args, kwargs))

    def _call(self, name: str, args: Any, kwargs: Any) -> Call:
        future: Future[Any] = Future()
        if self._dead:
            future.set_exception(RayActorError())
            return Call(future)
        if name == "__ray_ready__":
            future.set_result(None)
            return Call(future)
        method = getattr(self._target, name)
        if inspect.iscoroutinefunction(method):
            future = asyncio.run_coroutine_threadsafe(method(*args, **kwargs), self._cluster.loop)
            outer: Future[Any] = Future()
            self._open.add(outer)
            future.add_done_callback(lambda done: self._end(outer, done))
            return Call(outer)
        try:
            future.set_result(method(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return Call(future)

    def _end(self, outer: "Future[Any]", done: "Future[Any]") -> None:
        self._open.discard(outer)
        if outer.done():
            return
        error = done.exception()
        if isinstance(error, RayActorError):
            self._cluster.kill(self)
        if error is None:
            outer.set_result(done.result())
        elif not outer.done():
            outer.set_exception(error)


class Cluster:
    """Stands for the module `ray`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def remote(self, cls: Any = None, **_: Any) -> Any:
        if cls is None:
            return self.remote
        made = SimpleNamespace(remote=lambda *args, **kwargs: Handle(self, cls(*args, **kwargs)))
        made.options = lambda **_: made
        return made

    def get(self, calls: Any) -> Any:
        if isinstance(calls, list):
            return [self.get(call) for call in calls]
        return calls.future.result(timeout=600)

    def wait(
        self, calls: list[Any], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        done, _ = wait([call.future for call in calls], timeout, return_when=FIRST_COMPLETED)
        ready = [call for call in calls if call.future in done][:num_returns]
        return ready, [call for call in calls if call not in ready]

    def kill(self, handle: Handle) -> None:
        """Ends an actor; what it had not answered fails, `wait_for_death` too."""
        handle._dead = True
        for outer in list(handle._open):
            if not outer.done():
                outer.set_exception(RayActorError())

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(
            get_accelerator_ids=lambda: {"GPU": ["0"]}, get_node_id=lambda: "node"
        )
