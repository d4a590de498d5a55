# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""Whether a server may get several requests at once: the trial and its judgement, and what ends pipelining later.

Servers that cannot deal with it are in wire/test_pipelining.py.
"""

import collections

import pytest

from bb.connections import Disconnected, ProtocolError
from bb.connections.pipelining import (DEPTH, INCONCLUSIVE, KEEPALIVE_FROM, MAX_BODIES, MAX_DEPTH, MIN_REQUESTS, PROVEN_AFTER,
                                       SMALL_BODIES, STRIKES, Load, Pipelining)
from bb.connections.request import Request, Response
from bb.connections.requestqueue import RequestQueue

URL = "http://mirror.example/"

class Connection:
    """What Pipelining looks at"""

    def __init__(self, in_flight=0, served=1, version=(1, 1), close_announced=False, proxy=None):
        self.in_flight = collections.deque(range(in_flight))
        self.served = served
        self.version = version
        self.is_open = True
        self.close_announced = close_announced
        request = head("x", {"http_proxy": proxy} if proxy else {})
        self.origin, self.route = request.origin, request.route


def head(name, environment=None):
    return Request("HEAD", URL + name, environment or {})


def found(length=1, etag=None):
    return Response(200, {"etag": etag} if etag else {}, length)


def missing():
    return Response(404, {}, 10)


def options(status=405, **headers):
    return Response(status, headers, 0)


def queue_of(requests):
    queue = RequestQueue()
    for request in requests:
        queue.add(request)
    return queue


def begin(pipelining, response, number=4, connection=None):
    """The Trial after an answer, or None"""
    known = head("known")
    queue = queue_of([head(str(i)) for i in range(number)])
    return pipelining.trial(connection or Connection(), (known, response, None), queue)


def judge(trial, *responses):
    """What the trial makes of answers in this order: (outcome, responses by target)"""
    assert len(responses) == len(trial.sent)
    for request, response in list(zip(trial.sent, responses))[:-1]:
        assert not trial.add([(request, response, None)])
    assert trial.add([(trial.sent[-1], responses[-1], None)])
    outcome, answers = trial.evaluate()
    return outcome, [(request.target, response) for request, response, _ in answers]


@pytest.fixture
def pipelining():
    return Pipelining(needs_trial=True)


def test_one_by_one_until_it_is_known(pipelining):
    assert pipelining.room(Connection(in_flight=0)) == 1
    assert pipelining.room(Connection(in_flight=1)) == 0


def test_without_a_trial():
    assert Pipelining(needs_trial=False).room(Connection(in_flight=3)) == MAX_DEPTH - 3


def test_trial_sends_the_probe_as_the_second(pipelining):
    trial = begin(pipelining, found())
    assert [request.target for request in trial.sent] == ["/0", "/known", "/1", "/2", "/3"]
    assert [request.method for request in trial.sent] == ["HEAD"] * 5
    assert [request.target for request in trial.requests] == ["/0", "/1", "/2", "/3"]


def test_trial_is_as_deep_as_what_follows(pipelining):
    assert len(begin(pipelining, found(), number=100).requests) == DEPTH


@pytest.mark.parametrize("status", [500, 403, 204])
def test_no_trial_now(pipelining, status):
    assert begin(pipelining, Response(status, {}, 0)) is None
    assert begin(pipelining, found())


@pytest.mark.parametrize("connection", [Connection(version=(1, 0)), Connection(proxy="http://proxy.example")])
def test_no_trial_at_all(pipelining, connection):
    assert begin(pipelining, found(), connection=connection) is None
    assert begin(pipelining, found()) is None
    assert pipelining.room(Connection()) == 1


@pytest.mark.parametrize("requests", [
    [head(str(i)) for i in range(MIN_REQUESTS - 1)],
    [head("0"), head("1"), Request("GET", URL + "2", {}), head("3"), head("4")],
])
def test_too_few_questions_for_a_trial(pipelining, requests):
    queue = queue_of(requests)
    assert pipelining.trial(Connection(), (head("known"), found(), None), queue) is None
    assert list(queue) == requests, "in the old order"


def test_answer_after_a_redirect(pipelining):
    """On the connection to the host where it has led to, it is as good as others."""
    known = Request("HEAD", "http://other.example/", {})
    known.redirect(URL + "x")
    assert pipelining.trial(Connection(), (known, found(), None), queue_of([head(str(i)) for i in range(9)]))


@pytest.mark.parametrize("name", ["redirected", "GET", "error"])
def test_answer_that_is_no_use_for_a_trial(pipelining, name):
    known = Request("GET", URL, {}) if name == "GET" else head("known")
    if name == "redirected":
        known.redirect("http://other.example/")
    answer = known, found(), ProtocolError("odd") if name == "error" else None
    assert pipelining.trial(Connection(), answer, queue_of([head(str(i)) for i in range(9)])) is None


def test_works(pipelining):
    trial = begin(pipelining, found(7))
    answers = [missing(), found(7), found(2), missing(), found(3)]
    assert judge(trial, *answers) == ("works", [("/0", answers[0]), ("/1", answers[2]), ("/2", answers[3]), ("/3", answers[4])])
    pipelining.finish("works")
    assert pipelining.room(Connection(in_flight=3)) == DEPTH - 3
    assert begin(pipelining, found()) is None, "no further trial"


@pytest.mark.parametrize("answers", [
    [found(7), missing(), found(2), missing(), found(3)],
    [missing(), found(2), found(7), missing(), found(3)],
    [missing(), found(7, '"other"'), found(2), missing(), found(3)],
])
def test_answers_in_another_order(pipelining, answers):
    """The probe has not the answer that it had before: all are asked again."""
    assert judge(begin(pipelining, found(7)), *answers) == ("fails", [])
    pipelining.finish("fails")
    assert pipelining.room(Connection(in_flight=0)) == 1
    assert begin(pipelining, found()) is None


def test_probe_that_looks_like_its_neighbour(pipelining):
    """Nothing is known, and the neighbour may have got the answer to another one: it is tried again with an OPTIONS."""
    answers = [found(7), found(7), found(2), missing(), found(3)]
    assert judge(begin(pipelining, found(7)), *answers) == (None, [])
    pipelining.finish(None)
    assert begin(pipelining, found(7)).sent[1].method == "OPTIONS"


def test_all_look_the_same(pipelining):
    """Nothing is known, but whatever the order is the answers are right."""
    outcome, answers = judge(begin(pipelining, found(7)), *[found(7)] * 5)
    assert outcome is None
    assert answers == [("/%s" % i, found(7)) for i in range(4)]


@pytest.mark.parametrize("probe", [options(405), options(200, allow="GET, HEAD"), options(501), options(204)])
def test_works_where_all_are_missing(pipelining, probe):
    trial = begin(pipelining, missing())
    assert trial.sent[1].method == "OPTIONS"
    assert judge(trial, missing(), probe, missing(), missing(), missing())[0] == "works"


@pytest.mark.parametrize("answers", [
    [options(), missing(), missing(), missing(), missing()],
    [missing(), missing(), options(), missing(), missing()],
    [missing(), options(), options(), missing(), missing()],
])
def test_options_in_the_wrong_place(pipelining, answers):
    assert judge(begin(pipelining, missing()), *answers) == (None, [])


@pytest.mark.parametrize("status", [429, 503])
def test_refusal_is_no_result(pipelining, status):
    assert judge(begin(pipelining, found()), found(2), Response(status, {}, 0), found(3), found(4), found(5)) == (None, [])


def test_trials_without_a_result_have_an_end(pipelining):
    for _ in range(INCONCLUSIVE):
        assert begin(pipelining, found())
        pipelining.finish(None)
    assert begin(pipelining, found()) is None


@pytest.mark.parametrize("error, answered, outcome", [
    (None, 0, None), (Disconnected("closed"), 0, "broke"), (Disconnected("closed"), 1, "fails"),
    (ProtocolError("odd"), 0, "fails"),
])
def test_connection_that_ends_during_the_trial(pipelining, error, answered, outcome):
    trial = begin(pipelining, found())
    trial.add([(request, found(), None) for request in trial.sent[:answered]])
    assert trial.ended(error) == outcome


def test_broken_trials_are_strikes(pipelining):
    for _ in range(STRIKES):
        assert begin(pipelining, found())
        pipelining.finish("broke")
    assert begin(pipelining, found()) is None


@pytest.fixture
def proven(pipelining):
    begin(pipelining, found())
    pipelining.finish("works")
    return pipelining


@pytest.mark.parametrize("latency", [None, 0.03])
def test_more_in_flight_are_tried_on_one_connection(proven, latency):
    """Twice as many, and none behind them until all are answered; then they are the measure for all."""
    connection, depths = Connection(served=9), []
    proven.answered(connection, 1, 0.02, 1000)
    while proven.depth < MAX_DEPTH:
        proven.answered(connection, 1 if latency else proven.depth, latency, 1000)
        assert proven.room(Connection()) == proven.depth
        connection.in_flight.extend(range(proven.room(connection)))
        while connection.in_flight:
            assert proven.room(connection) == 0
            connection.in_flight.popleft()
            connection.served += 1
            proven.answered(connection, 1, 0.1, 1000)
        depths.append(proven.depth)
    assert depths == [2 * DEPTH, 4 * DEPTH, MAX_DEPTH]
    proven.answered(connection, MAX_DEPTH, latency, 1000)
    assert proven.room(connection) == MAX_DEPTH


def test_trial_of_more_waits_for_what_is_in_flight(proven):
    connection = Connection(served=9, in_flight=3)
    proven.answered(connection, DEPTH, None, 1000)
    assert proven.room(connection) == 0
    connection.in_flight.clear()
    connection.served += 3
    proven.answered(connection, 3, None, 1000)
    assert proven.room(connection) == 2 * DEPTH


def test_no_more_in_flight_where_each_answer_takes_its_time(proven):
    connection = Connection()
    proven.answered(connection, 1, 0.02, 1000)
    proven.ended(connection, None)
    proven.answered(connection, DEPTH // 2, 0.04, 1000)
    assert proven.room(connection) == DEPTH


def test_fewer_than_were_to_be_tried_prove_nothing(proven):
    connection = Connection(served=9)
    proven.answered(connection, DEPTH, None, 1000)
    connection.served += DEPTH - 1
    proven.answered(connection, 1, None, 1000)
    assert proven.depth == proven.room(connection) == DEPTH


def test_no_more_in_flight_if_few_wait(proven):
    connection = Connection(served=9)
    proven.answered(connection, DEPTH, 0.02, 2 * DEPTH - 1)
    assert proven.room(connection) == DEPTH


def test_requests_that_do_not_permit_more_in_flight(proven):
    """Such as those for large bodies: it is not tried again and again, since the connection has to run dry for that."""
    connection = Connection(served=9)
    for tried in [True] * STRIKES + [False]:
        proven.answered(connection, DEPTH, None, 1000)
        assert (proven.room(connection) == 2 * DEPTH) is tried
        connection.served += 2
        proven.answered(connection, 1, None, 0)


def test_rounds_of_few_do_not_add_up(proven):
    connection = Connection(served=9)
    proven.answered(connection, DEPTH, None, 1000)
    for _ in range(20):
        connection.served += 3
        proven.answered(connection, 3, None, 0)
    assert proven.depth == DEPTH


@pytest.mark.parametrize("error, ends", [(Disconnected("closed"), True), (ProtocolError("400"), True), (None, False)])
def test_more_in_flight_that_fail(proven, error, ends):
    for _ in range(STRIKES):
        connection = Connection(served=9)
        proven.answered(connection, DEPTH, None, 1000)
        assert proven.room(connection) == 2 * DEPTH
        connection.in_flight.append(1)
        proven.ended(connection, error)
    connection = Connection(served=9)
    proven.answered(connection, DEPTH, None, 1000)
    assert (proven.room(connection) == DEPTH) is ends
    assert proven.works


def test_next_connection_begins_with_one_request(proven):
    """RFC 9112 9.3.2"""
    proven.broken(Connection(in_flight=5, served=50))
    assert proven.room(Connection(served=0)) == 1
    assert proven.room(Connection(served=1)) == DEPTH
    assert proven.room(Connection(served=0)) == 1, "others do not matter"
    proven.answered(Connection(served=1), 1, None, 0)
    assert proven.room(Connection(served=0)) == DEPTH


@pytest.mark.parametrize("served, ends", [(PROVEN_AFTER - 1, True), (PROVEN_AFTER, False)])
def test_strikes(proven, served, ends):
    """Connections that break soon, one after the other. One that has answered enough is no fault of pipelining."""
    for _ in range(STRIKES):
        proven.broken(Connection(in_flight=5, served=served))
    assert (proven.room(Connection()) == 1) is ends


def test_contradictions_that_were_right_are_no_strikes(proven):
    """Files have changed since the query: asked for alone they are still others."""
    for _ in range(5 * STRIKES):
        proven.broken(Connection(in_flight=5, served=50))
        proven.revoke_strike()
    proven.revoke_strike()
    assert proven.room(Connection()) == DEPTH
    for _ in range(STRIKES):
        proven.broken(Connection(in_flight=5, served=50))
    assert proven.room(Connection()) == 1, "none is forgiven in advance"


def test_next_connection_gets_as_many_as_the_last_one_has_answered(proven):
    """Something cuts each connection after so many bytes."""
    proven.depth = MAX_DEPTH
    proven.broken(Connection(in_flight=5, served=3))
    assert proven.room(Connection(served=0)) == 1
    assert [proven.room(Connection(served=served)) for served in (1, 3, 10, 100)] == [3, 3, 10, MAX_DEPTH]
    assert proven.room(Connection(served=10, in_flight=4)) == 6


def test_server_that_sends_what_belongs_to_no_answer(proven):
    proven.disable()
    assert proven.room(Connection()) == 1
    assert begin(proven, found()) is None


def test_protocol_without_a_trial_goes_on():
    """Its answers have numbers."""
    pipelining = Pipelining(needs_trial=False)
    for _ in range(10):
        pipelining.broken(Connection(in_flight=5, served=50))
    assert pipelining.works and pipelining.room(Connection(served=MAX_DEPTH)) == MAX_DEPTH


def test_server_that_closes_after_so_many_answers(proven):
    proven.depth = MAX_DEPTH
    proven.closed(Connection(served=30, close_announced=True))
    assert proven.room(Connection(served=0, in_flight=0)) == 30
    assert proven.room(Connection(served=20, in_flight=4)) == 6
    assert proven.room(Connection(served=30)) == MAX_DEPTH, "it did not close this one"


@pytest.mark.parametrize("connection", [Connection(served=KEEPALIVE_FROM - 1, close_announced=True), Connection(served=30)])
def test_other_ends_say_nothing_about_the_next(proven, connection):
    proven.depth = MAX_DEPTH
    proven.closed(connection)
    assert proven.room(Connection(served=0)) == MAX_DEPTH


# What may be sent behind what is in flight

def get(name, size=None, etag=None, first=False, exclusive=False):
    """A GET of a file, of which a HEAD has told size and etag unless size is None"""
    request = Request("GET", URL + name, {}, fd=0)
    if size is not None:
        request.size, request.validators = size, found(size, etag).validators
    request.first, request.exclusive = first, exclusive
    return request


def admits(in_flight, request, spare=None, needs_trial=True):
    """spare: whether another connection has no bodies in flight"""
    return Load(in_flight, needs_trial).admits(request, lambda: spare)


@pytest.mark.parametrize("in_flight, request_, admitted", [
    ([], get("a"), True),
    ([get("a", 5)], get("b", 6), True),
    ([get("a", 5, "1")], get("b", 5, "2"), True),
    ([get("a", 5, "1")], get("b", 5, "1"), False),
    ([get("a", 5)], get("b", 5), False),
    ([get("a", 5), get("c", 6)], get("b", 5), False),
    ([get("a")], get("b"), False),
    ([get("a", 5, "1")], get("b"), True),
    ([get("b")], get("a", 5, "1"), True),
    # Without any validators it may be of the same size
    ([get("a", 5)], get("b"), False),
    ([get("b")], get("a", 5), False),
    ([get("a", 5), get("c", 6, "1")], get("b"), False),
    ([head("a")], get("b"), True),
    ([head("a"), head("c")], get("b", 5), True),
])
def test_files_that_look_alike_are_never_in_flight_together(in_flight, request_, admitted):
    """If their bodies were mixed up, nothing would tell."""
    assert admits(in_flight, request_) is admitted
    assert admits(in_flight, request_, needs_trial=False), "the answers of sftp have numbers"


def test_files_that_look_alike_do_not_get_into_one_load():
    load = Load([], True)
    load.add(get("a", 5))
    assert not load.admits(get("b", 5), lambda: None)


@pytest.mark.parametrize("in_flight, request_", [
    ([head("a")], get("b", 5, exclusive=True)), ([get("a", 5, exclusive=True)], head("b")),
    ([get("a", 5, exclusive=True)], get("b", 6)),
])
def test_exclusive(in_flight, request_):
    assert not admits(in_flight, request_)
    assert admits([], request_)


@pytest.mark.parametrize("bodies, size, admitted", [
    (MAX_BODIES - 10, 10, True), (MAX_BODIES - 10, 11, False), (MAX_BODIES, 1, False), (0, 100 * MAX_BODIES, True),
])
def test_bytes_of_bodies_in_flight_are_limited(bodies, size, admitted):
    assert admits([get("a", bodies)] if bodies else [], get("b", size)) is admitted


@pytest.mark.parametrize("bodies, spare, admitted", [
    (SMALL_BODIES, True, True), (SMALL_BODIES + 1, True, False), (SMALL_BODIES + 1, False, True), (SMALL_BODIES + 1, None, True),
])
def test_question_does_not_wait_behind_a_long_body_if_another_connection_has_none(bodies, spare, admitted):
    assert admits([get("a", bodies)], head("b"), spare) is admitted


@pytest.mark.parametrize("first, size, spare, admitted", [
    (False, SMALL_BODIES + 1, True, True), (False, SMALL_BODIES + 1, False, False), (False, SMALL_BODIES, False, True),
    (True, SMALL_BODIES + 1, False, True), (False, SMALL_BODIES + 1, None, True),
])
def test_long_body_that_nobody_waits_for_leaves_one_connection_free(first, size, spare, admitted):
    assert admits([], get("a", size, first=first), spare) is admitted
