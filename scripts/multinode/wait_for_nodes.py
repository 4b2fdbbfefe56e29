"""`python scripts/multinode/wait_for_nodes.py ADDRESS COUNT [TIMEOUT_S]`: returns when COUNT nodes
have joined Ray."""

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
    """Prints the nodes; what is wrong if they are fewer after `timeout_s` seconds."""
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
    """Whether this process has joined as a driver. Raises ray.exceptions.AuthenticationError
    without a token."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection(
            (host, int(port)), timeout=1
        ).close()  # Ray itself waits minutes for nobody
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
