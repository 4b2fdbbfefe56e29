"""Waits until COUNT nodes have joined the Ray cluster at ADDRESS.

python scripts/multinode/wait_for_nodes.py ADDRESS COUNT [TIMEOUT_S]
"""

import socket
import sys
import time

import ray

CURE = (
    "Look at the output of scripts/multinode/ray_node.sh on the machines that are missing. Each "
    "must reach the "
    "address, run the same Python and Ray, have the head's RAY_AUTH_MODE and, with token, its "
    "~/.ray/auth_token"
)


def main(address: str, count: int, timeout_s: float = 300) -> str | None:
    """Waits, and prints the nodes. Returns what is wrong if they are too few after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not connected(address):
        if time.monotonic() > deadline:
            return f"error: no Ray answers at {address} within {timeout_s:g} s. {CURE}"
        time.sleep(1)
    while len(nodes := [node for node in ray.nodes() if node["Alive"]]) < count:
        if time.monotonic() > deadline:
            return (
                f"error: {len(nodes)} of {count} nodes within {timeout_s:g} s: {described(nodes)}. "
                f"{CURE}"
            )
        time.sleep(1)
    sys.stdout.write(f"{len(nodes)} nodes: {described(nodes)}\n")
    return None


def connected(address: str) -> bool:
    """Tries to join the cluster as a driver; returns whether that worked.

    Raises ray.exceptions.AuthenticationError without a valid token.
    """
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would wait minutes for a head that is not there.
        socket.create_connection((host, int(port)), timeout=1).close()
        ray.init(address, logging_level="ERROR", log_to_driver=False)
    except (OSError, RuntimeError):
        return False
    return True


def described(nodes: list[dict]) -> str:
    """Address and resources of each node."""
    has = [(node["NodeManagerAddress"], node["Resources"].get) for node in nodes]
    return ", ".join(
        f"{address} ({get('CPU', 0):g} CPU, {get('GPU', 0):g} GPU)" for address, get in has
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:])))
