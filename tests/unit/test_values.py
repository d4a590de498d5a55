# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""The variables, the errors, and the small parsers of header values."""

import pickle
import time
import types

import bb
import bb.data
import pytest

from bb import connections
from bb.connections import request
from bb.networksettings import number, settings
from bb.sharedconnections import SharedConnections


def datastore(**variables):
    d = bb.data.init()
    for name, value in variables.items():
        d.setVar(name, value)
    return d


def test_defaults():
    assert settings(datastore())._asdict() == {"enabled": True, "connections": 4, "most_connections": 4,
                                               "sources": ["mirror"], "prefetch": 64}


@pytest.mark.parametrize("value, enabled", [("", True), (" ", True), ("0", False), ("1", True), (" 0 ", False), ("no", False),
                                            ("Yes", True), ("false", False), ("n", False)])
def test_switch(value, enabled):
    assert settings(datastore(BB_CONNECTION_CACHE=value)).enabled is enabled


@pytest.mark.parametrize("value", ["1", "4", "64", " 8 ", "007"])
def test_maximum(value):
    found = settings(datastore(BB_CONNECTION_CACHE_MAX=value, BB_NUMBER_THREADS="32"))
    assert found.connections == found.most_connections == int(value)


@pytest.mark.parametrize("threads, most", [("1", 4), ("4", 4), ("10", 10), ("64", 16), ("abc", 4)])
def test_maximum_that_is_not_set(threads, most):
    """As many as there are threads at most. An invalid number of these is reported elsewhere."""
    found = settings(datastore(BB_NUMBER_THREADS=threads))
    assert (found.connections, found.most_connections) == (4, most)


@pytest.mark.parametrize("value, sources", [("", ["mirror"]), ("mirror", ["mirror"]), (" mirror\n", ["mirror"]),
                                            ("hashserv  mirror", ["hashserv", "mirror"])])
def test_sources(value, sources):
    assert settings(datastore(BB_SETSCENE_PRESENCE=value)).sources == sources


@pytest.mark.parametrize("value", ["0", "1", "1024"])
def test_prefetch(value):
    assert settings(datastore(BB_SETSCENE_PREFETCH=value)).prefetch == int(value)


@pytest.mark.parametrize("value, result", [(None, None), ("", None), (" ", None), ("1", 1), ("999999999", 999999999)])
def test_number_without_a_largest_one(value, result):
    assert number("NAME", value) == result


@pytest.mark.parametrize("value", ["0", "-1", "x", "1" * 10, "1" * 5000])
def test_not_a_number(value):
    with pytest.raises(ValueError) as error:
        number("NAME", value)
    assert "NAME" in str(error.value) and "a positive integer" in str(error.value)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("name, value, allowed", [
    ("BB_CONNECTION_CACHE", "maybe", ['"0"', '"1"']),
    ("BB_CONNECTION_CACHE", "2", ['"0"', '"1"']),
    ("BB_CONNECTION_CACHE_MAX", "0", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "65", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "-1", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "4.0", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "four", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "\u0664", ["1", "64"]),
    ("BB_SETSCENE_PREFETCH", "-1", ["0", "1024"]),
    ("BB_SETSCENE_PREFETCH", "many", ["0", "1024"]),
    ("BB_SETSCENE_PRESENCE", "hashserv", ["mirror", "hashserv mirror"]),
    ("BB_SETSCENE_PRESENCE", "mirror hashserv", ["mirror", "hashserv mirror"]),
])
def test_invalid_value_is_one_line_and_ends_the_build(name, value, allowed, caplog):
    d = datastore(**{name: value})
    with pytest.raises(ValueError) as error:
        settings(d)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith('Invalid value "%s" for %s, must be ' % (value, name))
    for part in allowed:
        assert part in message
    with pytest.raises(bb.BBHandledException):
        SharedConnections(types.SimpleNamespace(extraconfigdata={}), d).start(needed=False)


@pytest.mark.parametrize("error", [
    connections.ConnectError("no", retryable=False), connections.RefusedError("busy", 7.0),
    connections.StatusError("strange", 418), connections.ProtocolError("broken"), connections.Cancelled("over"),
])
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert (copy.kind, copy.retryable) == (error.kind, error.retryable)
    assert copy.__dict__ == error.__dict__


@pytest.mark.parametrize("value, seconds", [
    ("7", 7.0), (" 7 ", 7.0), ("0", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ("soon", None), ("-5", None), ("", None), ("\u0667", None),
])
def test_retry_after(value, seconds):
    assert request.retry_after({"retry-after": value}) == seconds


def test_retry_after_date():
    value = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < request.retry_after({"retry-after": value}) <= 100
    assert request.retry_after({}) is None


def test_last_modified():
    assert request.last_modified({"last-modified": "Tue, 07 Jul 2020 07:07:07 GMT"}) == 1594105627
    for value in ("yesterday", "", "Tue, 99 Jul 2020 07:07:07 GMT"):
        assert request.last_modified({"last-modified": value}) is None
    assert request.last_modified({}) is None
