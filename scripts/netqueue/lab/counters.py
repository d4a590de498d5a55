# Copyright BitBake Contributors
# SPDX-License-Identifier: GPL-2.0-only
"""What a mirror over HTTP counts. Called by nginx.py and ownserver.py.

    counters = summarise(connections, [Request(1, 1, "HEAD", "/x", 200, False)])
    print(counters.connections, counters.statuses.get(404, 0))
"""

import dataclasses
from typing import Dict, List


@dataclasses.dataclass
class Request:
    connection: int
    number: int             # first request on its connection is 1
    method: str
    path: str               # as it was sent, percent signs included
    status: int
    session_reused: bool    # TLS


@dataclasses.dataclass
class Counters:
    connections: int        # accepted, those without any request included
    requests: int
    methods: Dict[str, int]
    statuses: Dict[int, int]


def summarise(connections, requests: List[Request]) -> Counters:
    counters = Counters(connections, len(requests), {}, {})
    for request in requests:
        counters.methods[request.method] = counters.methods.get(request.method, 0) + 1
        counters.statuses[request.status] = counters.statuses.get(request.status, 0) + 1
    return counters
