"""Where the rendezvous of a process group listens."""

from datetime import timedelta

import psutil
import pytest

from vargpt_rl.common.network import free_port
from vargpt_rl.common.rendezvous import rendezvous


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_it_listens_on_the_given_address_alone(host):
    limit, port = timedelta(seconds=30), free_port()
    try:
        first = rendezvous(host, port, 0, 2, limit)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    second = rendezvous(host, port, 1, 2, limit)
    first.set("key", "value")
    assert second.get("key") == b"value"
    assert listened_on(port) == {host}
    del first, second
    assert listened_on(port) == set()


def listened_on(port: int) -> set[str]:
    """Addresses on which this process listens at a port."""
    connections = psutil.Process().net_connections()
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN and each.laddr.port == port}
