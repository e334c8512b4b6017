"""Deliveries: signed, tried again with growing pauses, never lost, given up in the end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import redis
from standardwebhooks import Webhook, WebhookVerificationError

from service.clock import millis
from service.documents import MergeRecord
from service.jobs import Jobs
from service.reindex import Reindexer
from service.schemas.webhooks import MergeEnded, WebhookPing
from service.storage import Storage
from service.webhooks.deliver import SCHEDULE, Deliverer
from service.webhooks.deliveries import DUE, LEASE_MILLIS, Deliveries, Delivery, announce
from service.webhooks.endpoints import Endpoint, Endpoints
from service.webhooks.guard import Allowed
from service.webhooks.messages import of_end, ping
from service.webhooks.outbox import Outbox
from service.webhooks.sign import check_secret, headers, new_secret
from tests.redis_server import RECIPE
from tests.running import until
from tests.service.receiver import in_turn, receiver, status

LOOPBACK = Allowed.parse("127.0.0.0/8")
QUICK = (0.05, 0.05)


@pytest.fixture
def endpoints(storage: Storage) -> Endpoints:
    return Endpoints(storage)


@pytest.fixture
def deliveries(connection: redis.Redis) -> Deliveries:
    return Deliveries(connection)


def ended(**more: Any) -> MergeRecord:
    fields = {
        "id": "mrg_" + "1" * 32,
        "tenant": "acme",
        "state": "failed",
        "recipe": RECIPE.model_dump(mode="json"),
        "created_at": "2026-01-01T00:00:00.000Z",
        "finished_at": "2026-01-01T00:01:00.000Z",
        "error": {"type": "t", "title": "t", "status": 422, "detail": "no", "code": "no", "errors": []},
    }
    return MergeRecord.model_validate({**fields, **more})


@contextmanager
def sending(
    endpoints: Endpoints, deliveries: Deliveries, *, allowed: Allowed = LOOPBACK, **more: Any
) -> Iterator[None]:
    """The loop runs meanwhile, in a thread of its own."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    deliverer = Deliverer(
        endpoints, deliveries, Outbox(endpoints._storage), allowed, **{"schedule": QUICK, **more}
    )
    thread = threading.Thread(target=loop.run_until_complete, args=(deliverer.run(stop),))
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def outcome(deliveries: Deliveries, message_id: str, *states: str) -> Delivery:
    def found() -> Delivery | None:
        delivery = deliveries.find("acme", message_id)
        return delivery if delivery is not None and delivery.state in states else None

    delivery: Delivery = until(found, what=f"a delivery that is {states}")
    return delivery


def send(
    endpoints: Endpoints,
    deliveries: Deliveries,
    url: str,
    *states: str,
    then: Callable[[Endpoint], None] | None = None,
    **more: Any,
) -> Delivery:
    """Send a ping to a URL; what came of it."""
    endpoint = endpoints.create("acme", url)
    message = ping(endpoint)
    deliveries.add(endpoint.tenant, endpoint.id, message)
    if then is not None:
        then(endpoint)
    with sending(endpoints, deliveries, **more):
        return outcome(deliveries, message.id, *(states or ("delivered", "failed", "dropped")))


class TestSignatures:
    def test_the_reference_implementation_accepts_them(self) -> None:
        secret, body = new_secret(), b'{"a": "\xc3\xa4"}'
        signed = headers(secret, "msg_1", int(time.time()), body)
        assert Webhook(secret).verify(body, signed) == {"a": "\u00e4"}
        for changed in (
            {**signed, "webhook-id": "msg_2"},
            {**signed, "webhook-timestamp": str(int(time.time()) + 1)},
        ):
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(body, changed)
        with pytest.raises(WebhookVerificationError):
            Webhook(new_secret()).verify(body, signed)

    def test_they_are_those_of_the_reference_implementation(self) -> None:
        secret, moment = new_secret(), 1_700_000_000
        expected = Webhook(secret).sign("msg_1", datetime.fromtimestamp(moment, UTC), "{}")
        assert headers(secret, "msg_1", moment, b"{}")["webhook-signature"] == expected

    @pytest.mark.parametrize(
        "secret", ["", "whsec_", "whsec_abc", "whsec_" + "!" * 40, "QUFB" * 10, "whsec_" + "QUFB" * 22]
    )
    def test_a_weak_or_broken_secret_is_refused_and_not_shown(self, secret: str) -> None:
        with pytest.raises(Exception, match="not usable") as raised:
            check_secret(secret)
        content = secret.removeprefix("whsec_")
        assert not content or content not in str(raised.value)


class TestMessages:
    def test_they_are_as_described(self) -> None:
        endpoint = Endpoint(id="whk_1", tenant="acme", url="https://x", created_at="2026-01-01T00:00:00.000Z")
        body = MergeEnded.model_validate_json(of_end(ended(), endpoint).body)
        assert (body.type, body.data.id, body.data.method) == ("merge.failed", "mrg_" + "1" * 32, "linear")
        assert body.data.error is not None
        files = [{"path": "a.json", "sha256": "0" * 64, "size": 1}]
        result = {"attempt": "1", "recipe_digest": "d", "seconds": 1.0, "files": files}
        done = of_end(ended(state="succeeded", error=None, result=result), endpoint)
        told = MergeEnded.model_validate_json(done.body).data.result
        assert told is not None
        assert told.model_dump()["files"] == files
        assert WebhookPing.model_validate_json(ping(endpoint).body).data.webhook == "whk_1"

    def test_the_same_end_is_the_same_message(self) -> None:
        endpoint = Endpoint(id="whk_1", tenant="acme", url="https://x", created_at="2026-01-01T00:00:00.000Z")
        assert of_end(ended(), endpoint) == of_end(ended(), endpoint)
        other = endpoint.model_copy(update={"id": "whk_2"})
        assert of_end(ended(), endpoint).id != of_end(ended(), other).id


class TestSending:
    def test_it_arrives_signed(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        with receiver(status(200, b"thank you")) as there:
            delivery = send(endpoints, deliveries, there.url)
        assert delivery.state == "delivered"
        [attempt] = delivery.attempts
        assert (attempt.status, attempt.error, attempt.response) == (200, None, "thank you")
        endpoint = endpoints.get("acme", delivery.webhook)
        assert there.verified(endpoints.secret_of(endpoint))["data"] == {"webhook": endpoint.id}
        [(got, _)] = there.received
        assert got["webhook-id"] == delivery.id
        assert got["content-type"] == "application/json"
        assert got["host"] == there.url.split("/")[2]

    def test_it_is_tried_again_under_the_same_id(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        with receiver(in_turn(status(500, b"oh"), status(503), status(204))) as there:
            delivery = send(endpoints, deliveries, there.url)
        assert delivery.state == "delivered"
        assert [attempt.status for attempt in delivery.attempts] == [500, 503, 204]
        assert {got["webhook-id"] for got, _ in there.received} == {delivery.id}

    def test_after_the_last_attempt_the_endpoint_is_disabled(
        self, endpoints: Endpoints, deliveries: Deliveries
    ) -> None:
        with receiver(status(500)) as there:
            delivery = send(endpoints, deliveries, there.url)
        assert (delivery.state, len(delivery.attempts), len(there.received)) == ("failed", 3, 3)
        endpoint = endpoints.get("acme", delivery.webhook)
        assert endpoint.disabled_at is not None
        assert "the answer was 500" in str(endpoint.disabled_because)
        assert endpoints.concerned(ended()) == []
        assert endpoints.enable("acme", endpoint.id).disabled_at is None

    def test_gone_disables_at_once(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        with receiver(status(410)) as there:
            delivery = send(endpoints, deliveries, there.url)
        assert (delivery.state, len(delivery.attempts)) == ("failed", 1)
        assert endpoints.get("acme", delivery.webhook).disabled_at is not None

    def test_nothing_more_is_sent_to_one_that_is_gone(
        self, endpoints: Endpoints, deliveries: Deliveries
    ) -> None:
        with receiver() as there:
            first = send(endpoints, deliveries, there.url, then=lambda e: endpoints.disable(e, "test"))
            second = send(endpoints, deliveries, there.url, then=lambda e: endpoints.delete("acme", e.id))
        assert (first.state, second.state, there.received) == ("dropped", "dropped", [])

    def test_redirects_are_not_followed(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        with receiver() as inside, receiver(status(302, Location=inside.url)) as there:
            delivery = send(endpoints, deliveries, there.url)
        assert delivery.state == "failed"
        assert "redirect" in str(delivery.attempts[0].error)
        assert inside.received == []

    def test_one_that_does_not_answer_is_given_up(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        release = threading.Event()
        with receiver(lambda handler: (release.wait(30), None)[1]) as there:
            started = time.monotonic()
            delivery = send(endpoints, deliveries, there.url, seconds=0.2, schedule=())
            release.set()
        assert time.monotonic() - started < 15
        assert (delivery.state, delivery.attempts[0].error) == ("failed", "no answer within 0.2 s")

    def test_one_that_trickles_for_ever_is_given_up_too(
        self, endpoints: Endpoints, deliveries: Deliveries
    ) -> None:
        def trickle(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.end_headers()
            for _ in range(200):
                handler.wfile.write(b".")
                handler.wfile.flush()
                time.sleep(0.02)

        with receiver(trickle) as there:
            delivery = send(endpoints, deliveries, there.url, seconds=0.3, schedule=())
        assert delivery.attempts[0].error == "no answer within 0.3 s"

    def test_little_is_read_of_a_long_answer(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        with receiver(status(200, b"x" * (8 << 20))) as there:
            delivery = send(endpoints, deliveries, there.url)
        assert delivery.state == "delivered"
        assert len(delivery.attempts[0].response or "") == 2048

    def test_what_is_not_allowed_gets_no_connection(
        self, endpoints: Endpoints, deliveries: Deliveries
    ) -> None:
        with receiver() as there:
            delivery = send(endpoints, deliveries, there.url, allowed=Allowed())
            name = there.url.replace("127.0.0.1", "localhost").replace("http:", "https:")
            other = send(endpoints, deliveries, name, allowed=Allowed())
        assert there.received == []
        assert str(delivery.attempts[0].error).startswith("webhook_url_refused")
        assert str(other.attempts[0].error).startswith("webhook_url_refused")

    def test_nobody_there(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        delivery = send(endpoints, deliveries, "http://127.0.0.1:9/", schedule=())
        assert str(delivery.attempts[0].error).startswith("the connection failed")

    def test_the_connection_goes_to_the_address_that_was_checked(
        self, endpoints: Endpoints, deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The name means loopback when it is checked; it is never looked up again."""
        real, asked = socket.getaddrinfo, []

        def getaddrinfo(host: Any, *more: Any, **rest: Any) -> Any:
            if host == "hooks.test":
                asked.append(host)
                return real("127.0.0.1", *more, **rest)
            return real(host, *more, **rest)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with receiver() as there:
            delivery = send(endpoints, deliveries, there.url.replace("127.0.0.1", "hooks.test"))
        assert delivery.state == "delivered"
        assert asked == ["hooks.test"]
        assert there.received[0][0]["host"].startswith("hooks.test:")

    def test_over_https_the_certificate_must_be_that_of_the_name(
        self, endpoints: Endpoints, deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The connection goes to the address, and asks for the name all the same."""
        real = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *more, **rest: real("127.0.0.1" if host == "hooks.test" else host, *more, **rest),
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            hellos: list[bytes] = []

            def look() -> None:
                connection, _ = listener.accept()
                with connection:
                    hellos.append(connection.recv(4096))

            thread = threading.Thread(target=look)
            thread.start()
            url = f"https://hooks.test:{listener.getsockname()[1]}/"
            delivery = send(endpoints, deliveries, url, schedule=())
            thread.join()
        assert str(delivery.attempts[0].error).startswith("the connection failed")
        assert b"hooks.test" in hellos[0]

    def test_one_that_does_not_answer_keeps_nobody_else_waiting(
        self, endpoints: Endpoints, deliveries: Deliveries
    ) -> None:
        release = threading.Event()
        with receiver(lambda handler: (release.wait(20), None)[1]) as slow, receiver() as quick:
            endpoint = endpoints.create("acme", slow.url)
            for _ in range(100):
                deliveries.add(endpoint.tenant, endpoint.id, ping(endpoint))
                time.sleep(0.001)  # a ping is named by its time
            delivery = send(endpoints, deliveries, quick.url, seconds=8.0)
            release.set()
        assert delivery.state == "delivered"
        assert 0 < len(slow.received) <= 4


class TestNothingIsLost:
    def test_a_message_whose_sender_died_is_sent_by_another(
        self, endpoints: Endpoints, deliveries: Deliveries, connection: redis.Redis
    ) -> None:
        with receiver() as there:
            endpoint = endpoints.create("acme", there.url)
            message = ping(endpoint)
            deliveries.add(endpoint.tenant, endpoint.id, message)
            now = int(time.time() * 1000)
            assert deliveries.claim(5) == [("acme", endpoint.id, message.id)]
            assert deliveries.claim(5) == []  # while it is leased
            assert deliveries.claim(5, moment=now + 2 * LEASE_MILLIS) != []
            connection.zadd(DUE, {f"acme/{endpoint.id}/{message.id}": now})  # the lease is over
            with sending(endpoints, deliveries):
                assert outcome(deliveries, message.id, "delivered").attempts[0].status == 204
            assert connection.zcard(DUE) == 0

    def test_a_stopped_loop_leaves_what_is_under_way_to_the_next(
        self, endpoints: Endpoints, deliveries: Deliveries, connection: redis.Redis
    ) -> None:
        release = threading.Event()
        with receiver(lambda handler: (release.wait(20), None)[1]) as there:
            endpoint = endpoints.create("acme", there.url)
            deliveries.add(endpoint.tenant, endpoint.id, ping(endpoint))
            with sending(endpoints, deliveries):
                until(lambda: there.received, what="the message arrives")
            assert connection.zcard(DUE) == 1
            release.set()

    def test_pauses_grow_and_vary(self, endpoints: Endpoints, deliveries: Deliveries) -> None:
        assert sum(SCHEDULE) > 17 * 3600
        assert list(SCHEDULE) == sorted(SCHEDULE)
        waits = [self.first_pause(endpoints, deliveries, chance) for chance in (0.0, 1.0)]
        assert waits == [pytest.approx(900, abs=5), pytest.approx(1100, abs=5)]

    def first_pause(self, endpoints: Endpoints, deliveries: Deliveries, chance: float) -> float:
        """Seconds from the first attempt, which fails, to the second one."""
        with receiver(status(500)) as there:
            endpoint = endpoints.create("acme", there.url)
            message = ping(endpoint)
            deliveries.add(endpoint.tenant, endpoint.id, message)
            with sending(endpoints, deliveries, schedule=(1000.0,), chance=lambda: chance):
                until(lambda: deliveries.get("acme", endpoint.id, message.id).attempts, what="an attempt")
        delivery = deliveries.get("acme", endpoint.id, message.id)
        assert delivery.state == "pending"
        return (millis(delivery.next_at or "") - millis(delivery.attempts[0].at)) / 1000

    def test_an_end_is_announced_once_to_everyone_concerned(
        self, endpoints: Endpoints, deliveries: Deliveries, connection: redis.Redis, storage: Storage
    ) -> None:
        every = endpoints.create("acme", "https://a.example/")
        endpoints.create("acme", "https://b.example/", events=("merge.succeeded",))
        endpoints.create("other", "https://c.example/")
        own = endpoints.attach("acme", ended().id, "https://d.example/")
        endpoints.attach("acme", "mrg_" + "2" * 32, "https://e.example/")
        for _ in range(3):
            announce(connection, storage, ended())
        assert {item[1] for item in deliveries.claim(10)} == {every.id, own.id}

    def test_an_end_is_announced_before_it_is_settled(
        self, endpoints: Endpoints, deliveries: Deliveries, connection: redis.Redis, jobs: Jobs
    ) -> None:
        endpoint = endpoints.create("acme", "https://a.example/")
        record = jobs.create("acme", RECIPE)
        jobs.cancel("acme", record.id)
        [(tenant, endpoint_id, message_id)] = deliveries.claim(10)
        assert (tenant, endpoint_id) == ("acme", endpoint.id)
        found = deliveries.get(tenant, endpoint_id, message_id)
        assert json.loads(found.body)["data"]["id"] == record.id
        assert found.type == "merge.cancelled"

    def test_a_repeated_merge_keeps_its_webhook_and_a_deleted_one_loses_it(
        self, endpoints: Endpoints, jobs: Jobs
    ) -> None:
        record = jobs.create("acme", RECIPE)
        endpoints.attach("acme", record.id, "https://d.example/", secret=new_secret())
        jobs.cancel("acme", record.id)
        again = jobs.repeat("acme", record.id)
        old, new = (endpoints.get("acme", f"whk_{item.id[4:]}") for item in (record, again))
        assert (new.url, new.secret, new.merge) == (old.url, old.secret, again.id)
        jobs.delete("acme", record.id)
        assert endpoints.find("acme", old.id) is None

    def test_a_wiped_redis_loses_no_message_that_was_not_confirmed(
        self,
        endpoints: Endpoints,
        deliveries: Deliveries,
        connection: redis.Redis,
        jobs: Jobs,
        storage: Storage,
    ) -> None:
        with receiver(in_turn(status(500), status(204))) as there:
            endpoints.create("acme", there.url)
            jobs.cancel("acme", jobs.create("acme", RECIPE).id)
            [(_, _, message_id)] = deliveries.claim(1)
            connection.flushall()
            for found in (1, 0):
                reindexed = Reindexer(storage, connection).run()
                assert reindexed is not None
                assert reindexed.found["messages"] == found, "what waits already is not sent twice"
            with sending(endpoints, deliveries):
                assert len(outcome(deliveries, message_id, "delivered").attempts) == 2
                until(lambda: not list(storage.keys("webhook-outbox")), what="nothing is left to send")
            connection.flushall()
            again = Reindexer(storage, connection).run()
            assert again is not None
            assert again.found["messages"] == 0
        assert {request[0]["webhook-id"] for request in there.received} == {message_id}

    def test_who_registers_after_an_end_is_not_told_of_it(
        self, endpoints: Endpoints, deliveries: Deliveries, jobs: Jobs
    ) -> None:
        record = jobs.create("acme", RECIPE)
        jobs.cancel("acme", record.id)
        endpoints.create("acme", "https://late.example/")
        jobs.settle("acme", record.id)
        assert deliveries.claim(1) == []
