# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Many requests in flight on a connection: what is sent when, and servers that do not support it."""

import socket
import threading

import pytest

from bb.connections.pipelining import STRIKES

# Requests in flight to begin with, and in the end
DEPTH = 8
MAX_DEPTH = 64

STATUSES = {"found": 200, "missing": 404}


def paths(number):
    return ["/%s/%s" % ("missing" if i % 3 == 2 else "found", i) for i in range(number)]


def urls(peer, number):
    return [peer.url(path) for path in paths(number)]


def parts(target):
    """Whether a file exists and its size, from its path"""
    kind, size = target.partition("?")[0].split("/")[1:]
    return kind, int(size)


def answer(talk, request, *headers, **kwargs):
    kind, size = parts(request.target)
    talk.answer(request, b"x" * size, *headers, status=STATUSES[kind], **kwargs)


def works(talk):
    for request in talk.requests():
        answer(talk, request)


def linger(talk):
    """Close as nginx does: what is still arriving must not make the system discard what was sent"""
    talk.sock.shutdown(socket.SHUT_WR)
    talk.wait_closed()


def assert_right(asked):
    """Each has the answer to its own question, or the file that belongs to it."""
    for one in asked:
        kind, size = parts(one.request.target)
        response, error = one.wait()
        assert error is None, "%s: %r" % (one.request.url, error)
        assert (response.status, response.length) == (STATUSES[kind], size), one.request.url
        assert one.file is None or one.body() == b"x" * size


def query(asking, peer, sizes):
    """Ask whether files of these sizes exist, as a build does before it fetches them. Returns their URLs."""
    found = [peer.url("/found/%s" % size) for size in sizes]
    assert_right(asking.ask("HEAD", found))
    return found


@pytest.fixture
def single(make_asking):
    """One connection a host"""
    return make_asking(1)


def test_rounds(peer, single):
    """First one alone, then the trial with a probe, then twice as many each time, as all have been answered at once."""
    rounds = [1, DEPTH + 1, 16, 32, MAX_DEPTH, MAX_DEPTH, MAX_DEPTH]
    found = []

    def script(talk):
        for number in rounds:
            # All have to come before one is answered
            requests = [talk.request() for _ in range(number)]
            while b"\r\n\r\n" in talk._buffer:
                requests.append(talk.request())
            found.append(len(requests))
            sizes = [parts(request.target) for request in requests]
            talk.send(b"".join(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (STATUSES[kind], size) for kind, size in sizes))
        talk.wait_closed()
    there = peer(script)
    asked = single.ask("HEAD", urls(there, sum(rounds) - 1))
    assert_right(asked)
    assert found == rounds
    assert there.connections == 1
    # The probe is the first request again, as the second of the trial
    assert there.targets == paths(2) + ["/found/0"] + paths(sum(rounds) - 1)[2:]


def test_all_connections_have_their_share(peer, make_asking):
    there = peer(works)
    asking = make_asking(4)
    assert_right(asking.ask("HEAD", urls(there, 1000)))
    assert there.peak <= 4
    # More, if a connection was slow and its requests were sent on another one
    assert asking.count("requests") == len(there.requests) >= 1001
    assert sorted(set(there.targets)) == sorted(paths(1000))


@pytest.mark.parametrize("announced", [True, False])
def test_closes_in_the_middle(peer, single, announced):
    """After 20 answers each time. Only what was not answered is sent again, on a new connection not at once in a pipeline."""
    first = {}

    def script(talk):
        for n, request in enumerate(talk.requests(), 1):
            if n == 1:
                first[talk.number] = talk._buffer
            answered.append(request.target)
            answer(talk, request, *["Connection: close"] * (announced and n == 20))
            if n == 20:
                linger(talk)
                return
    answered = []
    assert_right(single.ask("HEAD", urls(peer(script), 100)))
    assert sorted(answered) == sorted(paths(100) + ["/found/0"])
    if not announced:
        # RFC 9112 9.3.2
        assert set(first.values()) == {b""}
    assert single.count("refusals") == 0


def test_learns_after_how_many_answers_a_server_closes(peer, single):
    def script(talk):
        for n, request in enumerate(talk.requests(), 1):
            answer(talk, request, *["Connection: close"] * (n == 30))
            if n == 30:
                linger(talk)
                return
    there = peer(script)
    assert_right(single.ask("HEAD", urls(there, 300)))
    # In vain are at most those which were behind the last answer of the first connection
    assert 301 <= single.count("requests") <= 301 + 32
    assert there.connections == 11


def swaps(talk):
    """Answers two requests in the wrong order if both are there"""
    for request in talk.requests():
        if b"\r\n\r\n" in talk._buffer:
            other = talk.request()
            answer(talk, other)
        answer(talk, request)

def only_the_first(talk):
    """Answers a request that comes alone; of several only the first, and forgets the others"""
    for request in talk.requests():
        talk._buffer = b""
        answer(talk, request)

def only_the_last(talk):
    for request in talk.requests():
        while b"\r\n\r\n" in talk._buffer:
            request = talk.request()
        answer(talk, request)

def closes_if_pipelined(talk):
    """Answers the first of several requests, then closes"""
    for request in talk.requests():
        answer(talk, request)
        if talk._buffer:
            return

def resets_if_pipelined(talk):
    for request in talk.requests():
        if talk._buffer:
            talk.reset()
            return
        answer(talk, request)

def garbage_if_pipelined(talk):
    for request in talk.requests():
        if talk._buffer:
            talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nbody of an answer to HEAD")
            return
        answer(talk, request)

def same_answer_to_all(talk):
    """A cache that has mixed up the requests of a pipeline"""
    for request in talk.requests():
        behind = talk._buffer.count(b"\r\n\r\n")
        answer(talk, request)
        for _ in range(behind):
            talk.request()
            answer(talk, request)


@pytest.mark.parametrize("script", [swaps, only_the_first, only_the_last, closes_if_pipelined, resets_if_pipelined,
                                    garbage_if_pipelined, same_answer_to_all])
def test_server_that_does_not_support_it(peer, make_asking, script):
    """The trial finds that out, without a wrong answer, and everything is sent one by one from then on."""
    there = peer(script)
    asking = make_asking(1, timeout=0.3)
    assert_right(asking.ask("HEAD", urls(there, 60)))
    assert there.connections <= 3
    # Those of the trial
    assert len([path for path in set(there.targets) if there.targets.count(path) > 1]) <= DEPTH + 1
    assert asking.count("refusals") == 0
    assert asking.troubles() == []


def test_http_1_0(peer, single):
    def script(talk):
        for request in talk.requests():
            early.append(talk._buffer)
            answer(talk, request, "Connection: keep-alive", version="HTTP/1.0")
    early = []
    there = peer(script)
    assert_right(single.ask("HEAD", urls(there, 30)))
    assert early == [b""] * 30
    assert there.targets == paths(30)


def test_connection_close_each_time(peer, single):
    def script(talk):
        request = talk.request()
        if request:
            answer(talk, request, "Connection: close")
            talk.wait_closed()
    there = peer(script)
    assert_right(single.ask("HEAD", urls(there, 30)))
    assert there.targets == paths(30)
    assert there.received.count(b"HEAD") == 30


def test_proxy_is_not_pipelined(peer, single):
    def script(talk):
        for request in talk.requests():
            early.append(talk._buffer)
            talk.answer(request)
    early = []
    environment = {"http_proxy": peer(script).url("")}
    asked = single.ask("HEAD", ["http://mirror.example" + path for path in paths(30)], environment)
    assert [one.status() for one in asked] == [200] * 30
    assert early == [b""] * 30


def test_breaks_again_and_again_later(peer, single):
    """Passes the trial, but later connections die whenever two requests are in flight: one by one then"""
    def script(talk):
        for request in talk.requests():
            if talk._buffer and len(talk.peer.requests) > DEPTH + 2:
                talk.reset()
                return
            answer(talk, request)
    there = peer(script)
    assert_right(single.ask("HEAD", urls(there, 60)))
    assert there.connections <= 2 + STRIKES
    assert single.count("refusals") == 0


def test_bodies_are_pipelined(peer, single):
    most = []

    def script(talk):
        for request in talk.requests():
            if request.method == "GET":
                most.append(1 + talk._buffer.count(b"\r\n\r\n"))
            answer(talk, request)
    there = peer(script)
    assert_right(single.ask("GET", query(single, there, range(100))))
    assert there.connections == 1
    assert max(most) > DEPTH


def test_small_bodies_do_not_wait_behind_a_large_one(peer, single):
    """Nothing is sent behind a body that is long."""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET" and request.target.endswith("/2000000"):
                behind.append(talk._buffer)
            answer(talk, request)
    behind = []
    there = peer(script)
    found = query(single, there, [2000000, *range(20)])
    assert_right(single.ask("GET", [found[0], found[3], found[0], found[4], found[5]]))
    assert behind == [b""] * 2


def other_size(talk, request):
    talk.answer(request, b"y" * 8)

def no_such_file(talk, request):
    talk.answer(request, status=404)

def other_version(talk, request):
    answer(talk, request, 'ETag: "another"')

def other_size_in_chunks(talk, request):
    talk.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nyyyyyyyy\r\n0\r\n\r\n")


@pytest.mark.parametrize("fault", [other_size, no_such_file, other_version, other_size_in_chunks])
def test_answer_that_contradicts_the_query(peer, single, fault):
    """While several are in flight it may be the answer to another request: it is sent again, alone."""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET":
                deepest.append(1 + talk._buffer.count(b"\r\n\r\n"))
            if request.method == "GET" and request.target == "/found/7":
                alone.append(talk._buffer == b"")
            if request.method == "GET" and talk._buffer and request.target == "/found/7":
                fault(talk, request)
            else:
                answer(talk, request)
    alone, deepest = [], []
    there = peer(script)
    assert_right(single.ask("GET", query(single, there, range(100))))
    assert there.connections == 2
    assert alone == [False, True]
    assert max(deepest[-80:]) > 2, "the others are pipelined as before"


@pytest.mark.parametrize("fault", [other_size, no_such_file, other_version, other_size_in_chunks])
def test_answers_that_contradict_the_query_again_and_again(peer, single, fault):
    """Two such connections in a row end pipelining."""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET":
                deepest.append(1 + talk._buffer.count(b"\r\n\r\n"))
            if request.method == "GET" and talk._buffer and parts(request.target)[1] % 5 == 2:
                fault(talk, request)
            else:
                answer(talk, request)
    deepest = []
    there = peer(script)
    assert_right(single.ask("GET", query(single, there, range(100))))
    assert there.connections <= 1 + STRIKES
    assert max(deepest[-80:]) == 1


@pytest.mark.parametrize("fault", [other_size, no_such_file, other_version])
def test_objects_that_have_changed_do_not_end_it(peer, single, fault):
    """They contradict the query, but asked for alone they still do: nothing is mixed up."""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET":
                deepest.append(1 + talk._buffer.count(b"\r\n\r\n"))
            if request.method == "GET" and parts(request.target)[1] % 20 == 7:
                fault(talk, request)
            else:
                answer(talk, request)
    deepest = []
    asked = single.ask("GET", query(single, peer(script), range(100)))
    changed = [one for one in asked if parts(one.request.target)[1] % 20 == 7]
    assert_right([one for one in asked if one not in changed])
    assert {one.status() for one in changed} == {404 if fault is no_such_file else 200}
    if fault is other_size:
        assert {one.body() for one in changed} == {b"y" * 8}
    assert max(deepest[-10:]) > 2
    assert single.troubles() == []


def test_object_that_has_changed(peer, single):
    """In the answer to a request that was sent alone the new size is the truth."""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET":
                talk.answer(request, b"new content")
            else:
                answer(talk, request)
    there = peer(script)
    one, = single.ask("GET", query(single, there, range(20))[5:6])
    assert one.status() == 200
    assert one.body() == b"new content"


def test_refused_in_a_pipeline(peer, single):
    """Those that are refused are sent again after a pause and a probe, all others have their answers."""
    count = iter(range(10 ** 6))

    def script(talk):
        for request in talk.requests():
            if next(count) in (20, 22):
                talk.answer(request, status=503)
            else:
                answer(talk, request)
    there = peer(script)
    assert_right(single.ask("HEAD", urls(there, 60)))
    assert len(there.requests) == 60 + 1 + 2 + 1
    assert single.count("refusals") == 2
    assert single.troubles() == []


@pytest.mark.parametrize("status", [403, 405])
def test_head_is_refused(peer, single, status):
    """It is asked with a GET of one byte."""
    def script(talk):
        for request in talk.requests():
            kind, size = parts(request.target)
            if request.method == "HEAD":
                talk.answer(request, status=status)
            elif kind == "missing":
                talk.answer(request, b"no", status=404)
            else:
                assert request.headers["range"] == "bytes=0-0"
                talk.answer(request, b"x", "Content-Range: bytes 0-0/%s" % size, status=206)
    there = peer(script)
    asked = single.ask("HEAD", urls(there, 30))
    assert [one.status() for one in asked] == [STATUSES[parts(path)[0]] for path in paths(30)]
    assert [one.wait()[0].length for one in asked if one.status() == 200] == [i for i in range(30) if i % 3 < 2]
    assert there.connections == 1
    assert there.methods.count("GET") == 30


def test_head_is_refused_and_the_range_ignored(peer, single):
    """The whole file is of no use: the connection is closed rather than read it."""
    def script(talk):
        for request in talk.requests():
            if request.method == "HEAD":
                talk.answer(request, status=405)
            else:
                talk.answer(request, b"x" * 10, length=10 ** 9)
                return
    there = peer(script)
    asked = single.ask("HEAD", [there.url("/%s" % i) for i in range(5)])
    assert [one.status() for one in asked] == [200] * 5
    assert there.methods.count("GET") == 5


@pytest.mark.parametrize("status, content_range, outcome", [
    (206, "bytes 0-0/" + "1" * 5000, (200, None)), (206, "bytes 0-0/*", (200, None)), (206, "bytes 0-0/-1", (200, None)),
    (206, "", (200, None)), (206, "bytes 0-0/7", (200, 7)), (416, "bytes */0", (200, 0)), (416, "bytes */7", (416, 1)),
])
def test_size_in_a_content_range(peer, single, status, content_range, outcome):
    """An empty file has no first byte."""
    def script(talk):
        for request in talk.requests():
            if request.method == "HEAD":
                talk.answer(request, status=405)
            else:
                talk.answer(request, b"x", "Content-Range: " + content_range, status=status)
    asked, = single.ask("HEAD", [peer(script).url()])
    response, error = asked.wait()
    assert error is None
    assert (response.status, response.length) == outcome


def test_idle_closes_are_no_strikes(peer, single):
    """The server closes each connection that is idle; many requests at once find that out."""
    def script(talk):
        for request in talk.requests():
            most.append(1 + talk._buffer.count(b"\r\n\r\n"))
            answer(talk, request)
            if request.target.endswith("99"):
                linger(talk)
                return
    most = []
    there = peer(script)
    query(single, there, range(20))
    for i in range(2 * STRIKES):
        most.clear()
        query(single, there, range(100 * i + 181, 100 * i + 200))
        assert there.connections <= i + 1
    assert max(most) > DEPTH / 2
    assert (single.count("retries"), single.count("refusals")) == (0, 0)


def test_refused_before_the_trial(peer, single):
    """A refusal says nothing about pipelining."""
    def script(talk):
        for request in talk.requests():
            seen.append(talk._buffer.count(b"\r\n\r\n"))
            if len(seen) == 1:
                talk.answer(request, status=503)
            else:
                answer(talk, request)
    seen = []
    assert_right(single.ask("HEAD", urls(peer(script), 60)))
    assert max(seen) > 2


def test_nothing_for_a_trial(peer, single):
    """Downloads alone are sent one by one."""
    behind = []

    def script(talk):
        for request in talk.requests():
            behind.append(talk._buffer)
            answer(talk, request)
    there = peer(script)
    assert_right(single.ask("HEAD", [there.url("/found/100")]))
    assert_right(single.ask("GET", [there.url("/found/%s" % i) for i in range(10)]))
    assert behind == [b""] * 11


def backwards(talk):
    """Answers what is there in the reverse order"""
    for request in talk.requests():
        requests = [request]
        while b"\r\n\r\n" in talk._buffer:
            requests.append(talk.request())
        for one in reversed(requests):
            if one.method == "OPTIONS":
                talk.answer(one, b"", "Allow: GET, HEAD", status=405)
            else:
                answer(talk, one)


@pytest.mark.parametrize("first", ["missing", "found"])
def test_answers_that_look_the_same(peer, single, first):
    """The trial has to tell them apart: there are many alike before the first that is not."""
    there = peer(backwards)
    alike = [there.url("/%s/0?%s" % (first, i)) for i in range(30)]
    assert_right(single.ask("HEAD", alike + urls(there, 60)))


def test_all_are_missing(peer, single):
    """Then the probe is an OPTIONS."""
    def script(talk):
        for request in talk.requests():
            most.append(1 + talk._buffer.count(b"\r\n\r\n"))
            if request.method == "OPTIONS":
                talk.answer(request, b"", "Allow: GET, HEAD", status=405)
            else:
                answer(talk, request)
    most = []
    there = peer(script)
    assert_right(single.ask("HEAD", [there.url("/missing/%s" % n) for n in range(60)]))
    assert max(most) > 4
    assert there.methods.count("OPTIONS") == 1


def test_urgent_question_goes_before_others(peer, single):
    """It waits for what is in flight, not for what is queued."""
    gate = threading.Event()

    def script(talk):
        for request in talk.requests():
            if len(talk.peer.requests) > 20:
                gate.wait(10)
            answer(talk, request)
    there = peer(script)
    others = single.ask("HEAD", urls(there, 500), first=False)
    there.wait_for(lambda p: len(p.requests) > 20)
    urgent = single.ask("HEAD", [there.url("/found/1000")])
    gate.set()
    assert_right(urgent + others)
    assert there.targets.index("/found/1000") <= 21 + MAX_DEPTH


@pytest.mark.parametrize("known", [True, False], ids=["with its object", "with another siginfo"])
def test_siginfos_that_are_mixed_up(peer, make_asking, known):
    """No HEAD tells what they are: they are in flight alone, or beside what cannot be mistaken for them"""
    def script(talk):
        for request in talk.requests():
            if request.method == "GET" and b"\r\n\r\n" in talk._buffer:
                # The bodies are of the same size
                other = talk.request()
                pairs.append({request.target, other.target})
                send(talk, request, other.target)
                send(talk, other, request.target)
            else:
                send(talk, request, request.target)

    def send(talk, request, target):
        talk.answer(request, target.encode(), 'ETag: "%s"' % target)

    pairs = []
    there = peer(script)
    asking = make_asking(1)
    objects = ["/%02d" % number for number in range(40)]
    assert all(one.status() == 200 for one in asking.ask("HEAD", [there.url(path) for path in objects]))
    wanted = [path + suffix for path in objects for suffix in (("", ".s") if known else (".s",))]
    for one, path in zip(asking.ask("GET", [there.url(path) for path in wanted]), wanted):
        assert one.status() == 200
        assert one.body() == path.encode()
    assert not [pair for pair in pairs if all(target.endswith(".s") for target in pair)]
    assert bool(pairs) == known
