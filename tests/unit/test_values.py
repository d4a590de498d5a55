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
from bb.connections.server import Connections


def datastore(**variables):
    d = bb.data.init()
    for name, value in variables.items():
        d.setVar(name, value)
    return d


def test_defaults():
    assert connections.settings(datastore()) == (True, 4, 64, 1, ["mirror"], 64)


@pytest.mark.parametrize("value, enabled", [("", True), ("0", False), ("1", True)])
def test_switch(value, enabled):
    assert connections.settings(datastore(BB_CONNECTION_CACHE=value)).enabled is enabled


@pytest.mark.parametrize("value", ["1", "4", "64"])
def test_maximum(value):
    assert connections.settings(datastore(BB_CONNECTION_CACHE_MAX=value)).connections == int(value)


@pytest.mark.parametrize("name, value, allowed", [
    ("BB_CONNECTION_CACHE", "yes", ["0", "1"]),
    ("BB_CONNECTION_CACHE", "2", ["0", "1"]),
    ("BB_CONNECTION_CACHE_MAX", "0", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "65", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "-1", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "4.0", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "four", ["1", "64"]),
    ("BB_CONNECTION_CACHE_MAX", "\u0664", ["1", "64"]),
    ("BB_CONNECTION_CACHE_DEPTH", "0", ["1", "1024"]),
    ("BB_CONNECTION_CACHE_DEPTH", "1025", ["1", "1024"]),
    ("BB_SETSCENE_PREFETCH", "-1", ["0", "1024"]),
    ("BB_SETSCENE_PREFETCH", "many", ["0", "1024"]),
    ("BB_SETSCENE_PRESENCE", "hashserv", ["mirror", "hashserv mirror"]),
    ("BB_SETSCENE_PRESENCE", "mirror hashserv", ["mirror", "hashserv mirror"]),
])
def test_invalid_value_is_one_line_and_ends_the_build(name, value, allowed, caplog):
    d = datastore(**{name: value})
    with pytest.raises(ValueError) as error:
        connections.settings(d)
    message = str(error.value)
    assert "\n" not in message
    for part in [name, '"%s"' % value] + allowed:
        assert part in message
    with pytest.raises(bb.BBHandledException):
        Connections(types.SimpleNamespace(extraconfigdata={}), d).start(needed=False)


def test_threads_that_are_no_number_are_not_ours_to_complain_about():
    assert connections.settings(datastore(BB_NUMBER_THREADS="abc")).threads == 1


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
