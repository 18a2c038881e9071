"""The largest batches and events, on the real process: what they take of its memory, and how long others wait."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.cli.embedded.processes import Cluster
from tests.support.service import Service

#: the default of FI_MAX_BATCH_BYTES
SIZE = 8 * 2**20
#: bytes of memory for each byte of the bodies: as they come, joined, and as events; what a parser makes of one is small
MOST_MEMORY = 4
#: another request waits for at most this part of the work on a body, in processor time: other processes may have the
#: cores meanwhile. Parsed whole, nearly all of it was done at once
LARGEST_SHARE = 0.4
#: ... or this long: some turns, seconds of processor time
SOME_TURNS = 0.05
JSON, NDJSON, CLOUDEVENTS = "application/json", "application/x-ndjson", "application/cloudevents-batch+json"


@contextmanager
def running(cluster: Cluster, folder: Path) -> Iterator[Service]:
    settings = {"FI_LOG_URL": cluster.url, "FI_REPLICAS": "1", "FI_PORT": "0", "FI_STREAM_MAX_BYTES": "128MiB"}
    with Service(folder, "services.ingest", **settings) as service:
        service.wait_for("INGEST_STARTED")
        yield service


@pytest.fixture(scope="module")
def ingest(single_node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(single_node, tmp_path_factory.mktemp("ingest")) as service:
        yield service


def repeated(part: bytes, start: bytes = b"[", separator: bytes = b",", end: bytes = b"]", size: int = SIZE) -> bytes:
    """Return *part* as often as it fits into *size* bytes."""
    room = size - len(start) - len(end)
    return start + separator.join([part] * (room // (len(part) + len(separator)))) + end


LEGAL = b'{"event_type":"A","payload":{"speaker":"doctor","text":"' + b"Good morning \\u00e9. " * 400 + b'"}}'
WIDE = b'{"event_type":"A","payload":"%s"}' % ("😀".encode() * 3000)
CLOUDEVENT = b'{"specversion":"1.0","id":"%d","source":"/s","type":"T","subject":"c","data":' + LEGAL + b"}"
CLOUDEVENT_BATCH = b",".join(CLOUDEVENT % n for n in range(SIZE // (len(CLOUDEVENT) + 3)))
#: of the largest size, with as many objects as fit
LARGE = repeated(b'{"":0}', b'{"event_type":"A","payload":[', b",", b"]}", 2**20 - 64)
BODIES = {
    "empty objects": (repeated(b'{"":0}'), JSON, 413),
    "arrays of a number": (repeated(b"[0]"), JSON, 413),
    "one array of arrays": (repeated(b"[0]", b"[[", b",", b"]]"), JSON, 422),
    "one long string": (b'["' + b'\\"' * (SIZE // 2 - 2) + b'"]', JSON, 422),
    "empty lines": (b"\n" * SIZE, NDJSON, 422),
    "lines of a number": (repeated(b"0", b"", b"\n", b""), NDJSON, 413),
    "no cloudevents": (repeated(b'{"":0}'), CLOUDEVENTS, 413),
    "not JSON at its end": (repeated(WIDE)[:-1] + b"x", JSON, 400),
    "not JSON in its last event": (repeated(WIDE)[:-3] + b"1}]", JSON, 400),
    "legal array": (repeated(LEGAL), JSON, 202),
    "legal lines": (repeated(LEGAL, b"", b"\n", b""), NDJSON, 202),
    "legal cloudevents": (b"[" + CLOUDEVENT_BATCH + b"]", CLOUDEVENTS, 202),
    "large events": (repeated(LARGE), JSON, 202),
}


def processor_time(pid: int) -> float:
    """Return what the first thread of a process has had of the processors, seconds."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


class Probe(threading.Thread):
    """Asks the process for something small, again and again, and measures the most that it does before it answers."""

    def __init__(self, pid: int, port: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self._end = threading.Event()
        self.longest = 0.0

    def run(self) -> None:
        while not self._end.wait(0.002):
            before = processor_time(self._pid)
            self._connection.request("GET", "/problems/not-found")
            self._connection.getresponse().read()
            self.longest = max(self.longest, processor_time(self._pid) - before)
        self._connection.close()

    def stop(self) -> float:
        self._end.set()
        self.join()
        return self.longest


def most_memory(pid: int) -> int:
    """Return the most bytes that the process has had since :func:`forget`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def forget(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def post(port: int, body: bytes, kind: str, path: str = "/consultations/c/events/batch") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("what", BODIES)
def test_a_large_batch_takes_little_memory_and_stops_no_other_request(ingest: Service, what: str) -> None:
    """Whatever it is of: it is cut up before it is parsed, and what a parser makes of it is in memory for one event."""
    body, kind, expected = BODIES[what]
    port, pid = ingest.wait_for("INGEST_STARTED")["port"], ingest.process.pid
    forget(pid)
    before = most_memory(pid)
    probe = Probe(pid, port)
    started = processor_time(pid)
    probe.start()
    status = post(port, body, kind)
    waited, took = probe.stop(), processor_time(pid) - started
    grown = most_memory(pid) - before

    assert expected == status
    assert grown <= MOST_MEMORY * len(body), f"{grown / len(body):.1f} times the body"
    assert waited <= max(SOME_TURNS, LARGEST_SHARE * took), f"{waited:.3f} s of {took:.3f} s"


#: of the largest size, of what takes a parser the most memory for each byte
EVENTS = {
    "objects": LARGE,
    "numbers": repeated(b"1.5", b'{"event_type":"A","payload":[', b",", b"]}", 2**20 - 64),
    "names of its own": repeated(b'{"payload":0}', b'{"event_type":"A","payload":[', b",", b"]}", 2**20 - 64),
    "a cloudevent": repeated(
        b'{"":0}', CLOUDEVENT[: -len(LEGAL) - 1].replace(b"%d", b"number") + b"[", b",", b"]}", 2**20 - 300
    ),
}


@pytest.mark.parametrize("what", EVENTS)
def test_large_events_at_the_same_time_take_little_memory(single_node: Cluster, tmp_path: Path, what: str) -> None:
    """Each is parsed in parts: parsed whole, one of them took 35 times its body."""
    body, kind = EVENTS[what], "application/cloudevents+json" if what == "a cloudevent" else JSON
    with running(single_node, tmp_path) as ingest:
        port, pid = ingest.wait_for("INGEST_STARTED")["port"], ingest.process.pid
        forget(pid)
        before = most_memory(pid)
        with ThreadPoolExecutor(8) as clients:
            own = [body.replace(b'"number"', b'"%06d"' % number) for number in range(8)]  # with an id of its own each
            statuses = list(clients.map(lambda one: post(port, one, kind, "/consultations/c/events"), own))
        grown = most_memory(pid) - before

    assert [202] * 8 == statuses
    assert grown <= MOST_MEMORY * 8 * len(body), f"{grown / len(body) / 8:.1f} times the bodies"
