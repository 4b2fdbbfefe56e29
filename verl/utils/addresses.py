"""Which addresses are asked directly, whatever proxy the environment names.

They are those of this machine and of its cluster. `search_r1/search/addresses.py` and
`verl/utils/addresses.py` are one text: the retrieval side runs without verl.
"""

import ipaddress
import re
import socket
from functools import lru_cache
from urllib.parse import urlsplit

HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9_.-]*[a-z0-9])?")
PRIVATE_DOMAINS = (".local", ".localhost", ".internal")
"""Endings that the public name service never has (RFC 6761, 6762; `.internal`: reserved by
ICANN)."""


def direct(*urls: str) -> dict[str, None]:
    """The `mounts` of an httpx client that asks internal addresses without a proxy.

    About all others the environment decides (`http_proxy`, `https_proxy`, `no_proxy`).
    """
    hosts = {host_of(url) for url in urls}
    return {f"all://{bracketed(host)}": None for host in sorted(hosts) if is_internal(host)}


def host_of(url: str) -> str:
    """The host of an address, empty where there is none.

    The request itself will complain about that.

    >>> host_of("http://Node7:8000/retrieve"), host_of("http://[::1]:8000"), host_of("http://[::1")
    ('node7', '::1', '')
    """
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def bracketed(host: str) -> str:
    """A host as an address has it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def is_internal(host: str) -> bool:
    """Whether a host is of this machine or its cluster.

    No public proxy could reach it, or it is not a proxy's to know. Loopback, private and link-local
    numbers, names without a dot, names of private domains, the machine's own name.

    >>> [is_internal(host) for host in ("127.0.0.1", "10.1.2.3", "fe80::1", "node7", "db.internal")]
    [True, True, True, True, True]
    >>> is_internal("8.8.8.8"), is_internal("api.openai.com"), is_internal("")
    (False, False, False)
    """
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        if not HOST_NAME.fullmatch(host):
            return False
        return "." not in host or host.endswith(PRIVATE_DOMAINS) or host in own_names()
    return number.is_loopback or number.is_private or number.is_link_local


@lru_cache(maxsize=1)
def own_names() -> frozenset[str]:
    """The names under which this machine knows itself, in lower case."""
    return frozenset({socket.gethostname().lower(), socket.getfqdn().lower()})
