# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The pool's queue, limits, pauses and breaker, over connections that are only pretended."""

import collections
import itertools
import threading
import types

import pytest

from bb.connections import (Cancelled, ConnectError, DestinationError, Disconnected, ProtocolError, RefusedError,
                            StatusError, TimedOutError)
from bb.connections import host as host_module
from bb.connections.request import Response
from bb.connections.host import ATTEMPTS, BREAKER_FAILURES, LONE, TIMEOUT_ATTEMPTS
from bb.connections.pool import Pool
from support.asking import Asked, ask_all, wait_until

URL = "http://mirror.example/x"


class Mirror:
    """What the pretended connections are connected to, and their class."""
    serial = False
    trial = True

    def __init__(self):
        self.answer = lambda request: Response(200, {}, 0)
        self.connecting = lambda: None
        self.kind = PretendedConnection
        self.lock = threading.Lock()
        self.open = self.peak = self.made = self.aborted = self.flying = 0
        self.urls = []

    def __call__(self, origin, route, timeout):
        return self.kind(self, route)


class PretendedConnection:
    def __init__(self, mirror, route):
        self.mirror = mirror
        self.route = route
        self.reusable = False
        self.in_flight = collections.deque()
        self.served = 0
        self.error = None
        self._open = False

    def connect(self):
        self.mirror.connecting()
        with self.mirror.lock:
            self._open = True
            self.mirror.made += 1
            self.mirror.open += 1
            self.mirror.peak = max(self.mirror.peak, self.mirror.open)
        self.reusable = True

    def send(self, requests):
        self.in_flight.extend(requests)
        with self.mirror.lock:
            self.mirror.urls += [request.url for request in requests]
            self.mirror.flying = max(self.mirror.flying, len(self.in_flight))

    def receive(self):
        answer = self.mirror.answer(self.in_flight[0])
        if isinstance(answer, Exception):
            raise answer
        self.served += 1
        return [(self.in_flight.popleft(), answer, None)]

    def close(self):
        with self.mirror.lock:
            self.mirror.open -= self._open
            self._open = False

    def abort(self):
        with self.mirror.lock:
            self.mirror.aborted += 1


@pytest.fixture
def mirror():
    return Mirror()


@pytest.fixture
def pool(mirror, monkeypatch):
    monkeypatch.setattr(host_module, "PAUSE", 0.005)
    monkeypatch.setattr(host_module, "BREAKER_AFTER", 0)
    monkeypatch.setattr(host_module, "BREAKER_PAUSE", 60)
    made = Pool(4, classes={"http": mirror, "https": mirror})
    yield made
    assert made.stop()


def in_turn(*answers):
    """answers one after another, the last for ever; called from several threads"""
    rest = list(answers)
    lock = threading.Lock()

    def answer(request):
        with lock:
            return rest.pop(0) if len(rest) > 1 else rest[0]
    return answer


def test_one_connection_serves_one_after_another(pool, mirror):
    for i in range(20):
        asked = Asked("HEAD", URL + str(i))
        pool.submit(asked.request)
        assert asked.status() == 200
    assert mirror.made == 1
    assert mirror.urls == [URL + str(i) for i in range(20)]
    assert pool.statistics.requests == 20
    assert pool.statistics.connections == 1


def test_what_an_answer_leads_to_needs_no_further_connection(pool, mirror):
    """A task asks for the next file at once; the thread that told it the answer is as good as idle then."""
    asked = [Asked("HEAD", URL + str(i)) for i in range(10)]

    def chain(one):
        def done(request, response, error):
            following = asked[asked.index(one) + 1:]
            if following:
                following[0].request.done = chain(following[0])
                pool.submit(following[0].request)
            one._done(request, response, error)
        return done
    asked[0].request.done = chain(asked[0])
    pool.submit(asked[0].request)
    assert [one.status() for one in asked] == [200] * 10
    assert mirror.made == 1


def test_order_of_a_queue_is_kept(pool, mirror):
    pool.limit = 1
    asked = ask_all(pool, "HEAD", [URL + str(i) for i in range(50)])
    assert [one.status() for one in asked] == [200] * 50
    assert mirror.urls == [URL + str(i) for i in range(50)]


def test_never_more_connections_than_the_limit_and_all_of_them(pool, mirror):
    meet = threading.Barrier(4)
    waits = iter([True] * 4)

    def answer(request):
        if next(waits, False):
            meet.wait(10)
        return Response(200, {}, 0)
    mirror.answer = answer
    asked = ask_all(pool, "HEAD", [URL] * 200)
    assert [one.status() for one in asked] == [200] * 200
    assert mirror.peak == 4


def test_limit_is_per_host_and_user(pool, mirror):
    meet = threading.Barrier(3)
    mirror.answer = lambda request: meet.wait(10) and None or Response(200, {}, 0)
    pool.limit = 1
    asked = ask_all(pool, "HEAD", ["http://a.example/", "http://b.example/", "http://user@a.example/"])
    assert [one.status() for one in asked] == [200] * 3


def test_another_route_takes_the_place_of_a_connection(pool, mirror):
    environments = [{"http_proxy": "http://one.example"}, {"http_proxy": "http://two.example"}]
    asked = [Asked("HEAD", URL, environments[i % 2]) for i in range(200)]
    for one in asked:
        pool.submit(one.request)
    assert [one.status() for one in asked] == [200] * 200
    assert mirror.peak <= 4


@pytest.mark.parametrize("error, times", [(ProtocolError("broken"), 2), (TimedOutError("silence"), 1),
                                          (RefusedError("busy"), 2)])
def test_what_can_be_retried_is(pool, mirror, error, times):
    mirror.answer = in_turn(*[error] * times, Response(200, {}, 0))
    asked = Asked("HEAD", URL)
    pool.submit(asked.request)
    assert asked.status() == 200
    assert len(mirror.urls) == times + 1
    assert mirror.open <= 1
    assert pool.statistics.retries == times
    assert pool.statistics.refusals == (2 if isinstance(error, RefusedError) else 0)


@pytest.mark.parametrize("error, times", [(ProtocolError("broken"), ATTEMPTS), (RefusedError("busy"), ATTEMPTS),
                                          (TimedOutError("silence"), TIMEOUT_ATTEMPTS)])
def test_not_for_ever(pool, mirror, error, times):
    mirror.answer = in_turn(error)
    asked = Asked("HEAD", URL)
    pool.submit(asked.request)
    assert asked.error() is error
    assert len(mirror.urls) == times
    assert len(asked.calls) == 1


def test_what_cannot_be_retried_is_not(pool, mirror):
    mirror.answer = in_turn(StatusError("no length", 200))
    asked = Asked("HEAD", URL)
    pool.submit(asked.request)
    assert asked.error().status == 200
    assert len(mirror.urls) == 1


def test_a_fault_of_ours_reaches_who_waits(pool, mirror):
    mirror.answer = in_turn(ZeroDivisionError("ours"), Response(200, {}, 0))
    asked = ask_all(pool, "HEAD", [URL, URL])
    errors = [one.wait()[1] for one in asked]
    assert len([e for e in errors if e and "ours" in str(e)]) == 1
    assert [e for e in errors if not e]


def test_a_used_connection_that_the_server_gave_up_is_no_failure(pool, mirror):
    mirror.answer = in_turn(Response(200, {}, 0), Disconnected("closed"), Response(200, {}, 0))
    for _ in range(2):
        asked = Asked("HEAD", URL)
        pool.submit(asked.request)
        assert asked.status() == 200
    assert mirror.made == 2
    assert pool.statistics.retries == 0


def test_breaker_opens_fails_all_that_wait_and_closes_by_a_probe(pool, mirror, monkeypatch):
    def connecting():
        raise ConnectError("nobody there")
    mirror.connecting = connecting
    asked = ask_all(pool, "HEAD", [URL] * 30)
    errors = [one.error() for one in asked]
    assert all(e.kind == "connect" and not e.retryable for e in errors)
    assert [len(one.calls) for one in asked] == [1] * 30
    assert pool.troubles() == [("mirror.example", "nobody there")]

    late = Asked("HEAD", URL)
    pool.submit(late.request)
    assert late.answered, "is to fail at once while the breaker is open"

    # The pause over, one probe that fails opens it again
    host = pool._hosts[late.request.origin]
    host._pause_until = 0
    probe = Asked("HEAD", URL)
    pool.submit(probe.request)
    assert not probe.error().retryable
    assert host._pause_until > 0

    mirror.connecting = lambda: None
    host._pause_until = 0
    asked = ask_all(pool, "HEAD", [URL] * 30)
    assert [one.status() for one in asked] == [200] * 30
    assert mirror.peak == 1, "goes on with one connection"


def test_breaker_has_patience_with_a_mirror_that_is_restarted(pool, mirror, monkeypatch):
    monkeypatch.setattr(host_module, "BREAKER_AFTER", 10)
    tries = itertools.count(1)

    def connecting():
        if next(tries) <= 2 * BREAKER_FAILURES:
            raise ConnectError("nobody there")
    mirror.connecting = connecting
    pool.limit = 1
    asked = ask_all(pool, "HEAD", [URL] * 30)
    outcomes = [one.wait() for one in asked]
    # Those whose turn it was have failed
    assert [response is None for response, _ in outcomes] == [True] * (2 * BREAKER_FAILURES // ATTEMPTS) + [False] * 28
    assert pool.troubles() == []


def test_a_url_that_is_always_refused_does_not_hold_up_the_others(mirror, monkeypatch):
    monkeypatch.setattr(host_module, "PAUSE", 0.005)
    mirror.answer = lambda request: Response(503 if request.url == URL + "bad" else 200, {}, 0)
    mirror.trial = False
    pool = Pool(1, depth=2 * LONE, classes={"http": mirror})
    try:
        bad, others = Asked("HEAD", URL + "bad"), [Asked("HEAD", URL) for _ in range(20 * LONE)]
        pool.submit(bad.request, *[one.request for one in others])
        assert [one.status() for one in others] == [200] * len(others)
        assert isinstance(bad.error(), RefusedError)
        assert mirror.urls.count(URL + "bad") == ATTEMPTS
        # The last ones were asked behind all others
        assert mirror.urls[-2:] == [URL + "bad"] * 2
    finally:
        assert pool.stop()


def test_a_certificate_that_is_refused_is_not_tried_again(pool, mirror):
    def connecting():
        raise ConnectError("certificate", retryable=False)
    mirror.connecting = connecting
    pool.limit = 1
    asked = ask_all(pool, "HEAD", [URL] * 10)
    assert ["certificate" in str(one.error()) for one in asked] == [True] * 10
    assert pool.statistics.retries == 0


class NotByProxy(PretendedConnection):
    def connect(self):
        if self.route.proxy:
            raise ConnectError("not by proxy", retryable=False)
        super().connect()


def test_other_routes_go_on_when_one_cannot_be_used(pool, mirror):
    """A recipe may have certificates of its own, which are wrong"""
    mirror.kind = NotByProxy
    usual = Asked("HEAD", URL)
    pool.submit(usual.request)
    assert usual.status() == 200
    for _ in range(3):
        odd = Asked("HEAD", URL, {"http_proxy": "http://proxy.example"})
        pool.submit(odd.request)
        assert "not by proxy" in str(odd.error())
        assert not pool.well(odd.request.origin, odd.request.route)
        assert pool.well(usual.request.origin, usual.request.route)
        assert [one.status() for one in ask_all(pool, "HEAD", [URL] * 20)] == [200] * 20
    assert mirror.peak <= 4


def test_only_the_requests_of_a_route_that_cannot_be_used_fail(pool, mirror):
    mirror.kind = NotByProxy
    pool.limit = 1
    queued = threading.Event()
    mirror.answer = lambda request: queued.wait(10) and Response(200, {}, 0)
    asked = [Asked("HEAD", URL + str(i), {"http_proxy": "http://proxy.example"} if i % 3 == 1 else {}) for i in range(30)]
    for one in asked:
        pool.submit(one.request)
    queued.set()
    outcomes = [one.wait()[1] for one in asked]
    assert [i for i, error in enumerate(outcomes) if error] == list(range(1, 30, 3))


def test_a_route_that_could_not_be_used_is_tried_again(pool, mirror):
    def connecting():
        raise ConnectError("certificate", retryable=False)
    mirror.connecting = connecting
    failed = Asked("HEAD", URL)
    pool.submit(failed.request)
    assert failed.error()
    host = pool._hosts[failed.request.origin]
    late = Asked("HEAD", URL)
    pool.submit(late.request)
    assert late.answered, "is to fail at once"

    # The time over, but nothing known
    host._barred = {route: (0, error) for route, (_, error) in host._barred.items()}
    assert not pool.well(failed.request.origin, failed.request.route)
    mirror.connecting = lambda: None
    probe = Asked("HEAD", URL)
    pool.submit(probe.request)
    assert probe.status() == 200
    assert pool.well(failed.request.origin, failed.request.route)


def test_one_connection_more_that_is_refused_for_good(pool, mirror):
    """A proxy, or a sshd, may allow so many: those that work do, and nothing fails"""
    allowed, refused = threading.Semaphore(2), threading.Event()

    class OneOfTwo(PretendedConnection):
        def connect(self):
            if not allowed.acquire(blocking=False):
                refused.set()
                raise ConnectError("no more", retryable=False)
            super().connect()

    mirror.kind = OneOfTwo
    mirror.answer = lambda request: refused.wait(10) and Response(200, {}, 0)
    asked = ask_all(pool, "HEAD", [URL + str(i) for i in range(200)])
    assert [one.status() for one in asked] == [200] * 200
    assert mirror.peak == 2


def test_who_waits_for_a_login_does_not_repeat_one_that_cannot_succeed(mirror):
    """sshd counts those"""
    mirror.serial, mirror.trial = True, False
    begun, attempts = threading.Event(), []

    def connecting():
        attempts.append(1)
        begun.wait(10)
        raise ConnectError("permission denied", retryable=False)
    mirror.connecting = connecting
    pool = Pool(4, classes={"http": mirror, "https": mirror})
    asked = ask_all(pool, "GET", [URL + str(i) for i in range(20)])
    host, = pool._hosts.values()
    wait_until(lambda: len(host._threads) == 4, "all threads")
    begun.set()
    assert ["permission denied" in str(one.error()) for one in asked] == [True] * 20
    assert len(attempts) == 1
    assert pool.stop()


class Nowhere(PretendedConnection):
    def connect(self):
        raise ConnectError("nobody there")


class Full(PretendedConnection):
    def receive(self):
        self.served += 1
        return [(self.in_flight.popleft(), None, DestinationError("full"))]


def test_what_is_wrong_here_says_nothing_of_the_host(pool, mirror):
    """A probe that the host has answered, and that fails even so"""
    mirror.kind = Nowhere
    for one in ask_all(pool, "HEAD", [URL] * 5):
        assert "left alone" in str(one.error())
    host = pool._hosts[one.request.origin]
    host._pause_until = 0
    mirror.kind = Full
    assert [str(one.error()) for one in ask_all(pool, "GET", [URL] * 3)] == ["full"] * 3


def test_other_hosts_go_on_when_one_is_left_alone(pool, mirror):
    broken = Asked("HEAD", "https://other.example/")

    def connecting():
        if threading.current_thread().name.endswith("other.example"):
            raise ConnectError("certificate", retryable=False)
    mirror.connecting = connecting
    pool.submit(broken.request)
    assert broken.error()
    asked = Asked("HEAD", URL)
    pool.submit(asked.request)
    assert asked.status() == 200


def test_timeouts_open_the_breaker_too(pool, mirror):
    """A mirror that accepts and never answers costs a time-out a request otherwise: hours for thousands."""
    mirror.answer = in_turn(TimedOutError("silence"))
    pool.limit = 1
    asked = ask_all(pool, "HEAD", [URL] * 20)
    for one in asked:
        one.error()
    assert len(mirror.urls) <= 2 * ATTEMPTS


def test_connections_rise_again_without_a_new_request(pool, mirror, monkeypatch):
    """A query is queued as a whole, so the queue and not submit() has to bring the threads back."""
    monkeypatch.setattr(host_module, "RISE_AFTER", 4)
    gate = threading.Event()
    mirror.answer = in_turn(RefusedError("busy"), Response(200, {}, 0))
    first = Asked("HEAD", URL)
    pool.submit(first.request)
    assert first.status() == 200
    wait_until(lambda: mirror.open <= 1, "the other connections are closed")
    host = pool._hosts[first.request.origin]
    assert host._limit < 4
    mirror.peak = mirror.open
    count = iter(range(1000))

    def answer(request):
        # Late answers keep all threads busy, as far as there are any
        if next(count) > 40:
            gate.wait(0.01)
        return Response(200, {}, 0)
    mirror.answer = answer
    asked = ask_all(pool, "HEAD", [URL] * 100)
    assert [one.status() for one in asked] == [200] * 100
    assert mirror.peak == 4


def test_idle_connections_are_closed_and_opened_again(pool, mirror, monkeypatch):
    monkeypatch.setattr(host_module, "IDLE", 0.02)
    for made in (1, 2):
        asked = Asked("HEAD", URL)
        pool.submit(asked.request)
        assert asked.status() == 200
        assert mirror.made == made
        host = pool._hosts[asked.request.origin]
        wait_until(lambda: not host._threads, "the idle thread has ended")
        assert mirror.open == 0


def test_cancelled_request_is_not_sent(pool, mirror):
    gate = threading.Event()
    mirror.answer = lambda request: gate.wait(10) and Response(200, {}, 0)
    pool.limit = 1
    first, second = ask_all(pool, "HEAD", [URL + "1", URL + "2"])
    second.request.cancelled = True
    gate.set()
    assert first.status() == 200
    assert isinstance(second.error(), Cancelled)
    assert mirror.urls == [URL + "1"]


def test_stop_ends_all_that_wait_once(mirror):
    pool = Pool(2, classes={"http": mirror, "https": mirror})
    gate = threading.Event()
    under_way = threading.Barrier(3)

    def answer(request):
        under_way.wait(10)
        gate.wait(10)
        return ProtocolError("aborted")
    mirror.answer = answer
    asked = ask_all(pool, "HEAD", [URL] * 10)
    under_way.wait(10)
    threading.Timer(0.05, gate.set).start()
    assert pool.stop()
    assert mirror.aborted == 2
    assert [len(one.calls) for one in asked] == [1] * 10
    assert all(isinstance(one.error(), Cancelled) for one in asked)
    assert mirror.open == 0
    late = Asked("HEAD", URL)
    pool.submit(late.request)
    assert isinstance(late.error(), Cancelled)


def test_stop_says_so_if_a_thread_is_left(mirror):
    pool = Pool(1, classes={"http": mirror, "https": mirror})
    gate = threading.Event()
    mirror.answer = lambda request: gate.wait(10) and Response(200, {}, 0)
    asked = Asked("HEAD", URL)
    pool.submit(asked.request)
    assert not pool.stop(timeout=0.05)
    gate.set()
    assert pool.stop()
    assert len(asked.calls) == 1


def test_redirects_have_an_end(pool, mirror):
    mirror.answer = lambda request: Response(302, {"location": request.url + "x"}, 0)
    asked = Asked("HEAD", URL)
    pool.submit(asked.request)
    assert asked.error().status == 302
    assert len(mirror.urls) == host_module.MAX_REDIRECTS + 1


class Batches(Mirror):
    """Answers all that is in flight at once, when released. sends: how many requests each send() had."""
    trial = False

    def __init__(self):
        super().__init__()
        self.sends = []

    def __call__(self, origin, route, timeout):
        return Batch(self, route)


class Batch(PretendedConnection):
    def send(self, requests):
        super().send(requests)
        with self.mirror.lock:
            self.mirror.sends.append(len(requests))

    def receive(self):
        self.mirror.hold(self)
        self.served += len(self.in_flight)
        answers = [(request, Response(200, {}, 0), None) for request in self.in_flight]
        self.in_flight.clear()
        return answers


def test_the_last_are_not_divided_again_and_again():
    """Of 22 two connections with room for 8 have 16 under way; the one that is ready first takes what is left."""
    mirror = Batches()
    both = threading.Barrier(3)
    gates = {}
    order = []

    def hold(connection):
        first = connection.served == 0
        if first:
            both.wait(10)
        else:
            with mirror.lock:
                order.append(connection)
                gate = gates.setdefault(connection, threading.Semaphore(0))
            assert gate.acquire(timeout=10)
    mirror.hold = hold
    pool = Pool(2, depth=8, classes={"http": mirror})
    try:
        begun = ask_all(pool, "HEAD", [URL + "a", URL + "b"])
        wait_until(lambda: mirror.sends == [1, 1], "both are asked")
        asked = [Asked("HEAD", URL + str(i)) for i in range(22)]
        pool.submit(*[one.request for one in asked])
        both.wait(10)
        wait_until(lambda: len(order) == 2, "both have work")
        assert mirror.sends[2:] == [8, 8]
        gates[order[0]].release()
        wait_until(lambda: len(order) == 3, "one has more")
        assert mirror.sends[2:] == [8, 8, 6]
        for gate in gates.values():
            gate.release(100)
        assert [one.status() for one in begun + asked] == [200] * 24
    finally:
        mirror.hold = lambda connection: None
        both.abort()
        for gate in gates.values():
            gate.release(100)
        assert pool.stop()


def test_who_logs_in_gets_no_share():
    mirror = Batches()
    mirror.serial = True
    mirror.hold = lambda connection: None
    logged_in = threading.Event()
    pool = Pool(4, depth=16, classes={"http": mirror})
    try:
        first = ask_all(pool, "HEAD", [URL])
        assert [one.status() for one in first] == [200]
        mirror.connecting = lambda: logged_in.wait(10)
        asked = [Asked("HEAD", URL + str(i)) for i in range(16)]
        pool.submit(*[one.request for one in asked])
        assert [one.status() for one in asked] == [200] * 16
        assert mirror.sends == [1, 16]
    finally:
        logged_in.set()
        assert pool.stop()


def test_the_host_has_work_before_answers_are_passed_on():
    mirror = Mirror()
    mirror.trial = False
    pool = Pool(1, depth=2, classes={"http": mirror})
    sent = []
    try:
        asked = [Asked("HEAD", URL + str(i)) for i in range(4)]
        for one in asked:
            one.request.done = lambda *answer, one=one: (sent.append(len(mirror.urls)), one._done(*answer))
        pool.submit(*[one.request for one in asked])
        assert [one.status() for one in asked] == [200] * 4
        assert sent == [3, 4, 4, 4]
    finally:
        assert pool.stop()


def test_a_long_body_does_not_hold_up_what_was_refused(mirror, monkeypatch):
    """The connection was to take it again, but it has to wait for a body by then: another one does."""
    monkeypatch.setattr(host_module, "PAUSE", 0.005)
    arrived = threading.Event()
    refused = in_turn(Response(503, {}, 0), Response(200, {}, 0))

    def answer(request):
        if request.url == URL + "refused":
            return refused(request)
        assert arrived.wait(10)
        return Response(200, {}, 0)
    mirror.answer = answer
    mirror.trial = False
    pool = Pool(4, depth=2, classes={"http": mirror})
    try:
        first, long = Asked("HEAD", URL + "refused"), Asked("HEAD", URL + "long")
        pool.submit(first.request, long.request)
        assert first.status() == 200
        assert not arrived.is_set()
        arrived.set()
        assert long.status() == 200
    finally:
        arrived.set()
        assert pool.stop()


def test_a_connection_that_was_never_used_is_closed_soon(mirror, monkeypatch):
    monkeypatch.setattr(host_module, "UNUSED", 0)
    answer, connect = threading.Event(), threading.Event()
    calls = in_turn(True, False)
    mirror.connecting = lambda: calls(None) or connect.wait(10)
    mirror.answer = lambda request: Response(200, {}, 0) if answer.wait(10) else None
    pool = Pool(4, classes={"http": mirror})
    try:
        asked = ask_all(pool, "HEAD", [URL + "0"])
        wait_until(lambda: mirror.urls, "the first is asked")
        asked += ask_all(pool, "HEAD", [URL + "1"])
        answer.set()
        assert [one.status() for one in asked] == [200, 200]
        connect.set()
        wait_until(lambda: mirror.made == 2 and mirror.open == 1, "the second has gone again")
    finally:
        answer.set()
        connect.set()
        assert pool.stop()


@pytest.mark.parametrize("number, latency, sessions, pays", [(100, 0.02, 1, False), (1200, 0.02, 1, False), (1400, 0.02, 1, True),
                                                             (1400, 0.02, 2, False), (100, 0.5, 1, True), (1, 0.02, 0, True)])
def test_logins_that_pay(number, latency, sessions, pays):
    """So many questions, answered 64 at a time after so many seconds: whether a login of 0.4 s would be done before."""
    mirror = Batches()
    mirror.serial = True
    pool = Pool(4, depth=64, classes={"http": mirror})
    host = host_module.Host(pool, Asked("HEAD", URL).request.origin)
    host._queue.extend(Asked("HEAD", URL + str(i)).request for i in range(number))
    host._login, host._latency = 0.4, latency
    assert host._pays(sessions) == pays
    host._queue.append(Asked("GET", URL).request)
    assert host._pays(sessions)


def test_one_login_for_a_few_questions(monkeypatch):
    clock = [0]
    monkeypatch.setattr(host_module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def log_in():
        clock[0] += 1

    mirror = Batches()
    mirror.serial = True
    mirror.connecting = log_in
    mirror.hold = lambda connection: None
    pool = Pool(4, depth=64, classes={"http": mirror})
    try:
        asked = ask_all(pool, "HEAD", [URL + str(i) for i in range(200)])
        assert [one.status() for one in asked] == [200] * 200
        assert mirror.made == 1
    finally:
        assert pool.stop()


def test_a_login_while_the_session_is_busy_with_a_file():
    """A question does not wait for the end of it."""
    mirror = Batches()
    mirror.serial = True
    go_on = threading.Event()
    mirror.hold = lambda connection: any(request.method == "GET" for request in connection.in_flight) and go_on.wait(10)
    pool = Pool(4, depth=2, classes={"http": mirror})
    try:
        large, = ask_all(pool, "GET", [URL + "large"])
        wait_until(lambda: mirror.sends == [1], "it is asked for")
        question, = ask_all(pool, "HEAD", [URL])
        assert question.status() == 200
        assert not large.answered and mirror.made == 2
        go_on.set()
        assert large.status() == 200
    finally:
        go_on.set()
        assert pool.stop()
