# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""One tree's connections in `scripts/bench pace`: bench/throughput.py starts it as a process.

Argument: a JSON object, see main(). Each line of its input is a mode, and what
that took is written for it. An empty object comes before, when all is prepared.

    head        HEADs of all small files
    get         GETs of all small files into descriptors
    large       GETs of all large files into descriptors
    compute     nothing but the computing thread, for a second

With " busy" behind it a thread only computes meanwhile, as the runqueue does.
"""

import contextlib
import json
import os
import resource
import sys
import tempfile
import threading
import time

# Until all is answered
SECONDS = 60

def main(lib, url, small, large, connections, folder):
    sys.path.insert(0, lib)
    import bb.server.process
    import bb.connections.server
    # Each request has a file of its own
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    core = (NewCore if hasattr(bb.connections.server, "ConnectionServer") else OldCore)(connections)
    sizes = {"head": small, "get": small, "large": large}
    # Also finds out whether requests can be pipelined
    measure(core, "head", url, small, folder, False)
    print("{}", flush=True)
    for line in sys.stdin:
        mode, _, busy = line.strip().partition(" ")
        print(json.dumps(measure(core, mode, url, sizes.get(mode), folder, bool(busy))), flush=True)
    core.stop()


def measure(core, mode, url, sizes, folder, busy):
    """
    Ask for the files of these sizes, whose numbers are their names, all at once. Returns answers and steps of the
    computing thread a second, and CPU milliseconds of this process an answer.
    """
    files = [tempfile.TemporaryFile(dir=folder) for _ in sizes] if mode in ("get", "large") else []
    if mode != "compute":
        name = "large" if mode == "large" else "small"
        core.prepare("GET" if files else "HEAD", ["%s/%s/%d" % (url, name, number) for number in range(len(sizes))],
                     [file.fileno() for file in files] or [None] * len(sizes), sizes)
    with computing(busy) as counter:
        started, cpu = time.monotonic(), time.process_time()
        if mode == "compute":
            time.sleep(1)
        else:
            core.ask()
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        steps = counter[0]
    for file, size in zip(files, sizes or ()):
        if os.fstat(file.fileno()).st_size != size:
            sys.exit("a file has not the size of that of the mirror")
        file.close()
    count = len(sizes) if sizes else 1
    return {"per_second": count / seconds, "cpu_ms": 1000 * cpu / count, "steps_per_second": steps / seconds}


@contextlib.contextmanager
def computing(wanted):
    """Yields a list whose element is how many steps a thread has done that only computes."""
    counter = [0]
    end = threading.Event()

    def compute():
        while not end.is_set():
            for value in range(1000):
                value * value
            counter[0] += 1

    thread = threading.Thread(target=compute)
    if wanted:
        thread.start()
    try:
        yield counter
    finally:
        end.set()
        if wanted:
            thread.join()


class Core:
    """prepare() makes requests; ask() returns when all are answered. If one has failed the process ends."""

    def __init__(self):
        from bb.connections.request import Request
        self.request = Request
        self.environment = {name: os.environ[name] for name in ("SSL_CERT_FILE", "PATH", "HOME") if name in os.environ}

    def judge(self, request, response, error, size):
        if error or response.status != 200 or response.length != size:
            print("%s %s: %s" % (request.method, request.url, error or response), file=sys.stderr, flush=True)
            os._exit(1)


class NewCore(Core):
    """A ConnectionServer. Answers are delivered to this thread."""

    def __init__(self, connections):
        super().__init__()
        from bb.connections.server import ConnectionServer
        self.server = ConnectionServer(connections)
        self.server.start()

    def prepare(self, method, urls, fds, sizes):
        self.requests = [self.request(method, url, self.environment, fd=fd, empty=True) for url, fd in zip(urls, fds)]
        self.sizes = dict(zip(self.requests, sizes))
        if method == "HEAD":
            # In a build each is asked once
            self.server.pool._answers.clear()

    def ask(self):
        self.server.submit(self.requests, self.answered, first=True)
        deadline = time.monotonic() + SECONDS
        while self.sizes:
            self.server.deliver(1)
            if time.monotonic() > deadline:
                sys.exit("no answer within %d s" % SECONDS)

    def answered(self, request, response, error):
        self.judge(request, response, error, self.sizes.pop(request))

    def stop(self):
        self.server.stop()


class OldCore(Core):
    """A Pool of the series up to November 2026, which called done() in threads of its own."""

    def __init__(self, connections):
        super().__init__()
        from bb.connections.pool import Pool
        self.pool = Pool(connections, 64)

    def prepare(self, method, urls, fds, sizes):
        self.left = threading.Semaphore(0)
        self.requests = [self.request(method, url, self.environment, fd=fd, size=size if fd else None, done=self.answered)
                         for url, fd, size in zip(urls, fds, sizes)]
        self.sizes = dict(zip(self.requests, sizes))

    def ask(self):
        self.pool.submit(*self.requests)
        for _ in self.requests:
            if not self.left.acquire(timeout=SECONDS):
                sys.exit("no answer within %d s" % SECONDS)

    def answered(self, request, response, error):
        self.judge(request, response, error, self.sizes[request])
        self.left.release()

    def stop(self):
        self.pool.stop()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
