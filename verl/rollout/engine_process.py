"""What is mixed into vLLM's worker, inside the engine's process."""

import os
import signal

from verl.utils.processes import follow


class FollowServer:
    """Ends the engine with the process that started it.

    vLLM's engine outlives a server that was killed (Ray kills its actors when the driver dies), and
    keeps its memory.
    """

    def follow(self, server: int) -> int:
        """Process of the engine. Watches the process `server`, its parent, from a thread."""
        engine = os.getpid() if os.getppid() == server else os.getppid()

        def end() -> None:
            os.kill(engine, signal.SIGKILL)
            os._exit(1)

        follow(server, end)
        return engine
