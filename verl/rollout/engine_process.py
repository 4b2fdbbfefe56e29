"""An extension of vLLM's worker class, which runs inside the engine's process."""

import os
import signal

from verl.utils.processes import follow


class FollowServer:
    """Ends the engine when the process that started it ends.

    Without this the engine would outlive a server that was killed (Ray kills its actors when the
    driver dies), and keep its memory.
    """

    def follow(self, server: int) -> int:
        """Watches the parent process `server` from a thread, and returns this process's id."""
        engine = os.getpid() if os.getppid() == server else os.getppid()

        def end() -> None:
            os.kill(engine, signal.SIGKILL)
            os._exit(1)

        follow(server, end)
        return engine
