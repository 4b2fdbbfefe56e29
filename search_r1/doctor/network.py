"""Checks of the network: ports, proxies, the Hugging Face hub and the retriever."""

import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx

from search_r1.doctor.finding import Finding, fine, problem, warning
from verl.utils.addresses import direct, host_of

DEFAULT_PORT = 8000
"""The port of `search-r1 serve` where none is named."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
TRUE = ("1", "on", "yes", "true")
ANSWER_S = 5


def loopback() -> Finding:
    """Whether processes of this machine can talk to each other."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=ANSWER_S).close()
    except OSError as error:
        return problem(
            "loopback",
            f"127.0.0.1 cannot be connected to ({error})",
            "allow connections of this machine with itself (firewall, sandbox)",
        )
    return fine("loopback", "processes of this machine can connect")


def default_port() -> Finding:
    """Whether the port is free that a retrieval server takes where none is named."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            return warning(
                "port of the retriever",
                f"port {DEFAULT_PORT} is taken",
                "fine if that is your retrieval server; else search-r1 serve --port ANOTHER",
            )
    return fine("port of the retriever", f"{DEFAULT_PORT} is free")


def proxies(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether a proxy would catch what is meant for this machine."""
    lower = {name.lower(): value for name, value in environment.items()}
    named = {name: lower[name] for name in PROXIES if lower.get(name)}
    if not named:
        return fine("proxies", "none")
    says = ", ".join(f"{name}={without_password(value)}" for name, value in named.items())
    uses_socks = any(urlsplit(value).scheme.startswith("socks") for value in named.values())
    if uses_socks and find_spec("socksio") is None:
        return problem(
            "proxies", f"{says}: httpx needs socksio for SOCKS", "pip install 'httpx[socks]'"
        )
    exempt = lower.get("no_proxy", "").replace(" ", "").split(",")
    if "*" in exempt or {"localhost", "127.0.0.1"} <= set(exempt):
        return fine("proxies", f"{says}; this machine is exempt")
    return warning(
        "proxies",
        f"{says}, and no_proxy does not exempt this machine. search-r1 asks internal addresses "
        "directly; curl and other programs do not",
        "export no_proxy=localhost,127.0.0.1",
    )


def without_password(address: str) -> str:
    """An address without the user and the password that may stand in it.

    >>> without_password("http://me:secret@proxy:3128")
    'http://proxy:3128'
    """
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def hub(environment: Mapping[str, str] = os.environ) -> Finding:
    """Whether the Hugging Face hub may be asked, and whether as somebody."""
    if environment.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        return warning(
            "Hugging Face hub",
            "HF_HUB_OFFLINE is set: only models and data in the cache can be used",
            "unset HF_HUB_OFFLINE to download; the closed world needs nothing of the hub",
        )
    if environment.get("HF_TOKEN"):
        return fine("Hugging Face hub", "HF_TOKEN is set")
    return fine("Hugging Face hub", "no HF_TOKEN, which only gated models such as Llama need")


def retriever(url: str) -> Finding:
    """Whether a retrieval server answers at its address."""
    shown = without_password(url)
    cure = "start it (search-r1 serve), or correct retriever.url"
    try:
        health = httpx.URL(url).join("/health")
        with httpx.Client(mounts=direct(url), timeout=ANSWER_S) as client:
            answer = client.get(health)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        says = f"{shown} does not answer ({type(error).__name__}: {error})"
        return problem("retriever", says, cure)
    if answer.status_code == httpx.codes.OK:
        return fine("retriever", f"{host_of(url)} answers")
    return problem("retriever", f"/health of {shown}: status {answer.status_code}", cure)


CHECKS = (loopback, default_port, proxies, hub)
