# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""One presence query of `scripts/bench presence`: bench/presence.py starts it as a process.

The real code of the tree in lib: of a patched one the connection server and
bb.presencequery, as the runqueue would call them; of a stock one what
openembedded-core's sstate_checkhashes() does, a Fetch for each object in
threads that share connections as far as fetch2 can. Both without progress
events. Of the first `files` objects each second exists. The answers are checked.

Argument: a JSON object, see main(). Writes one, see measure().
"""

import contextlib
import hashlib
import json
import os
import queue
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor

MEMORY = {"VmRSS": "now", "VmHWM": "peak"}


def object_name(number):
    """Path below the mirror, as long as a real one."""
    unihash = hashlib.sha256(b"%d" % number).hexdigest()
    return "%s/%s/sstate:recipe-%d:core2-64-poky-linux:1.0:r0:core2-64:14:%s_populate_sysroot.tar.zst" % (
        unihash[:2], unihash[2:4], number, unihash)


def object_size(number):
    return 1 + number % 4000


def main(lib, patched, url, objects, files, connections, variables, folder):
    """folder: an empty one, which bitbake makes other folders in"""
    sys.path.insert(0, lib)
    import bb.server.process
    import bb.data
    import bb.event
    import bb.fetch2

    d = make_datastore(bb, url, variables, folder)
    asked = [("recipe-%d.bb:do_populate_sysroot" % number, "file://" + object_name(number)) for number in range(objects)]
    expected = {asked[number][0]: object_size(number) for number in range(0, min(objects, files), 2)}
    if patched:
        done = measure(lambda: ask_at_once(asked, d, connections, url.partition(":")[0]))
    else:
        expected = dict.fromkeys(expected)
        done = measure(lambda: ask_each(bb, asked, d, connections))
    done["mapping_ms"] = mapping(bb, asked[:1000], d)
    answers = done.pop("answers")
    if answers != expected:
        sys.exit("wrong answers: %d of %d objects exist, not %d" % (len(answers), objects, len(expected)))
    print(json.dumps(done), flush=True)


def make_datastore(bb, url, variables, folder):
    """What sstate_checkhashes() makes of the configuration's; BB_ORIGENV as the cooker sets it."""
    d = bb.data.init()
    origenv = bb.data.init()
    for name, value in os.environ.items():
        origenv.setVar(name, value)
    d.setVar("BB_ORIGENV", origenv)
    for name in ("DL_DIR", "FILESPATH", "SSTATE_DIR", "TOPDIR"):
        # Stock bitbake makes folders in it, for its locks
        d.setVar(name, folder)
    d.setVar("PREMIRRORS", "file://.* %s/PATH;downloadfilename=PATH" % url)
    for name, value in variables.items():
        d.setVar(name, value)
    return d


def measure(ask):
    """Call ask, which returns the answers, when the first of them came, and what to call afterwards.

    Returns them with seconds, also those before the first answer, CPU seconds of this process and of its children,
    and KiB of memory at the end and at the most, each beyond what it was before.
    """
    before = memory()
    started, cpu = time.monotonic(), time.process_time()
    answers, first, stop = ask()
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    after = memory()
    stop()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"answers": answers, "seconds": seconds, "first_seconds": first - started, "cpu_seconds": cpu,
            "children_cpu_seconds": children.ru_utime + children.ru_stime,
            "kept_kib": after["now"] - before["now"], "peak_kib": after["peak"] - before["now"]}


def memory():
    values = {}
    with open("/proc/self/status") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in MEMORY:
                values[MEMORY[name]] = int(value.split()[0])
    return values


def mapping(bb, objects, d):
    """CPU milliseconds an object that fetch2 takes to find out where it may be: the same for all, and no small part."""
    mirrors = bb.fetch2.mirror_from_string(d.getVar("PREMIRRORS"))
    cpu = time.process_time()
    for _, uri in objects:
        ud = bb.fetch2.FetchData(uri, d)
        ud.setup_localpath(d)
        bb.fetch2.build_mirroruris(ud, mirrors, d)
    return 1000 * (time.process_time() - cpu) / len(objects)


def ask_at_once(objects, d, connections, scheme):
    """As bb.presence does"""
    try:
        from bb.connections.pool import PROTOCOLS
        from bb.connections.server import ConnectionServer
        from bb.presencequery import Query
    except ImportError as error:
        sys.exit("the patched tree cannot ask for many objects at once: %s" % error)
    if scheme not in PROTOCOLS:
        sys.exit("the patched tree has no shared connections for %s" % scheme)
    d.setVar("BB_NUMBER_THREADS", str(connections))
    server = ConnectionServer(connections)
    server.start()
    asking = Query(server, d)
    first = []
    passed_on = asking._done

    def done(*answer):
        if not first:
            first.append(time.monotonic())
        passed_on(*answer)

    asking._done = done
    sizes = asking.run(objects, lambda done: None)
    for host in asking.unanswered():
        sys.exit("%s did not answer for %d of %d objects: %s" % (host.origin.host, host.unanswered, host.asked, host.reason))

    def stop():
        assert server.stop()
    return sizes, first[0], stop


def ask_each(bb, objects, d, threads):
    """As openembedded-core's sstate_checkhashes() does"""
    found = {}
    first = []
    caches = queue.Queue(threads)
    for _ in range(threads):
        caches.put(bb.fetch2.FetchConnectionCache())

    def check(item):
        tid, uri = item
        cache = caches.get()
        data = bb.data.createCopy(d)
        data.setVar("SRC_URI", uri)
        with contextlib.suppress(bb.fetch2.FetchError):
            bb.fetch2.Fetch([uri], data, connection_cache=cache).checkstatus()
            found[tid] = None
        if not first:
            first.append(time.monotonic())
        caches.put(cache)
        bb.event.check_for_interrupts()

    with bb.utils.environment(**bb.fetch2.get_fetcher_environment(d)):
        bb.event.enable_threadlock()
        with ThreadPoolExecutor(max_workers=threads) as executor:
            for _ in executor.map(check, objects):
                pass
        while not caches.empty():
            caches.get().close_connections()
        bb.event.disable_threadlock()
    return found, first[0], lambda: None


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
