"""The uploader's transport: what a channel does when Redis goes away for a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis
from kombu import Connection
from kombu.common import ignore_errors

from tasks import transport
from tests.servers import RedisServer


@pytest.fixture
def connection(valkey: RedisServer) -> Iterator[Connection]:
    """A connection to the broker by our transport, with one message that nobody acknowledged."""
    with Connection(valkey.url, transport="tasks.transport:Transport") as made:
        yield made


def test_a_channel_without_a_connection_fails_like_a_connection(connection: Connection) -> None:
    """Given a channel whose pools are gone with its connection, when it must reach Redis, then that is an error which kombu forgives."""
    channel = connection.channel()
    assert isinstance(channel, transport.Channel)
    with channel.conn_or_acquire() as client:
        assert client.ping()
    channel._disconnect_pools()
    connection.transport.client, kept = None, connection.transport.client
    try:
        with pytest.raises(connection.connection_errors, match="let go of"):
            channel.qos._remove_from_indices("a tag").execute()
        ignore_errors(connection, channel.qos.restore_unacked)  # what ended the worker, by an AttributeError
    finally:
        connection.transport.client = kept
        channel.close()


@pytest.mark.parametrize("broken", [False, True])
def test_the_event_loop_never_waits_for_a_broadcast(own_valkey: RedisServer, broken: bool) -> None:
    """Given a worker told to read a connection that broke, or one on which nothing has come, then that is an error, and blocks nobody."""
    learned: list[BaseException] = []
    with Connection(own_valkey.url, transport="tasks.transport:Transport") as made, redis.Redis.from_url(own_valkey.url) as raw:
        channel = made.channel()
        channel.subclient.psubscribe("*")
        channel.subclient.parse_response()
        if broken:
            raw.client_kill_filter(_type="pubsub")

        def listen() -> None:
            try:
                channel._receive_one(channel.subclient)
            except made.connection_errors as exc:
                learned.append(exc)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        listener.join(20)
        assert not listener.is_alive(), "it waits for the next broadcast"
    assert len(learned) == 1
