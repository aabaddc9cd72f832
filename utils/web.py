"""Fetch from addresses that strangers wrote: politely, from public hosts only, within a time and a size.

`Client.fetch` returns a body or raises Skip with the reason. `in_order` makes many calls at once, few at each host,
and waits where a host asks it to.
"""

import heapq
import http.client
import io
import ipaddress
import itertools
import logging
import math
import os
import random
import resource
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from time import monotonic
from urllib.parse import urljoin
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3
from urllib3.util.connection import create_connection

USER_AGENT = "align_sd (research; regularization images for https://arxiv.org/abs/2303.14420)"
OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex", "none"}  # "none" is short for "noindex, nofollow"
MAX_REDIRECTS = 5
ATTEMPTS = 4  # of a request that a host answers with 429 or 503
BACK_OFF = 1.0  # seconds, doubled each time a host says so again
MAX_WAIT = 60.0  # seconds; rows of a host that asks for more are given up
REMEMBER = 300.0  # seconds that a name's addresses, and a host that does not answer, are remembered
# What older Pythons take for public: IETF assignments (a cloud's metadata among them), and locally translated IPv4.
NOT_PUBLIC = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("64:ff9b:1::/48"))


class Skip(Exception):
    """Why an address gives nothing: a kind that is counted and, after a colon, details."""


class Later(Skip):
    """A host that is busy: to be asked again, after `wait` seconds if it said so."""

    def __init__(self, reason: str, wait: float | None):
        super().__init__(reason)
        self.wait = wait


class Client:
    """Connections that are kept open, at most `per_host` to each host; names are looked up once in a while."""

    def __init__(self, num_workers: int, per_host: int, allow_private: bool):
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # odd headers of strange servers are no news
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a file a connection, and some shells allow 256
        enough = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft != resource.RLIM_INFINITY and soft < enough:
            resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
        self.lookups, self.lock = {}, threading.Lock()
        self.resolvers = ThreadPoolExecutor(32, thread_name_prefix="resolver")  # more would drown a home router
        self.silent = {}  # (host, port): failed connections in a row, and when the last was
        self.allow_private = allow_private

        options = {
            "num_pools": 2 * num_workers,
            "maxsize": per_host,
            "block": True,
            # Compression is not asked for: pictures do not shrink, and a small answer could unfold to gigabytes.
            "headers": {"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"},
            "ssl_context": ssl.create_default_context(cafile=certifi.where()),
        }
        self.direct = urllib3.PoolManager(**options)
        self.direct.pool_classes_by_scheme = {
            scheme: type("Pool", (pool,), {"ConnectionCls": guarded(pool.ConnectionCls, self)})
            for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool))
        }
        # Behind a proxy (HTTPS_PROXY) it is the proxy that connects, and that guards.
        self.proxies = {
            scheme: urllib3.ProxyManager(proxy, **options)
            for scheme, proxy in getproxies().items()
            if scheme in ("http", "https")
        }

    def fetch(self, url: str, timeout: float, max_bytes: int) -> bytes:
        """Return the body behind an http(s) address. Raises Skip, or Later where the host asks for patience."""
        deadline = monotonic() + timeout
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = self.request(url, deadline)
                try:
                    if opted_out(response.headers):
                        raise Skip("opted out: X-Robots-Tag")
                    target = response.get_redirect_location()
                    if response.status == 200:
                        return read_body(response, max_bytes)
                    response.read(65536)  # an answer that was read leaves its connection to the next
                    if target:
                        url = urljoin(url, target)
                        continue
                    if response.status in (429, 503):
                        raise Later(f"HTTP {response.status}", retry_after(response.headers))
                    raise Skip(f"HTTP {response.status}")
                finally:
                    response.close()  # hangs up, unless everything was read
                    response.release_conn()
            raise Skip("too many redirects")
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            # ValueError: addresses that cannot be parsed, or that a redirect points to with another scheme.
            if monotonic() >= deadline:
                raise Skip("timeout") from None
            if isinstance(error, ValueError):
                raise Skip(f"not an http(s) address: {url:.100}") from None
            raise Skip(f"broken connection: {type(error).__name__}") from None

    def request(self, url: str, deadline: float) -> urllib3.HTTPResponse:
        parsed = urllib3.util.parse_url(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(url)
        manager = self.direct
        if parsed.scheme in self.proxies and not proxy_bypass(parsed.host):
            manager = self.proxies[parsed.scheme]
        for last in (False, True):
            left = max(deadline - monotonic(), 0.001)
            try:
                return manager.request(
                    "GET",
                    parsed.url,
                    timeout=urllib3.Timeout(total=left),
                    pool_timeout=left,
                    preload_content=False,
                    decode_content=False,
                    redirect=False,
                    retries=False,
                )
            except urllib3.exceptions.ProtocolError:  # hung up on us: most often a kept connection that had gone stale
                if last:
                    raise

    def addresses(self, host: str, timeout: float) -> list[str]:
        """Return a host's addresses, all of them public unless private ones are allowed."""
        with self.lock:
            asked, lookup = self.lookups.pop(host, (-math.inf, None))
            if monotonic() - asked > REMEMBER:
                asked, lookup = monotonic(), self.resolvers.submit(look_up, host)
            self.lookups[host] = asked, lookup
            if len(self.lookups) > 20_000:
                del self.lookups[next(iter(self.lookups))]
        try:
            found = lookup.result(timeout)
        except FutureTimeout:
            raise Skip("timeout") from None
        except (OSError, UnicodeError):
            raise Skip(f"dead host: no such name as {host}") from None
        if not self.allow_private and not all(map(is_public, found)):
            raise Skip(f"refused address: {host} is {found[0]}, see --allow_private")
        return found


def guarded(connection_class, client: Client):
    """Return a class of connections that keep to public addresses and to their timeout."""

    class Guarded(connection_class):
        response_class = TimedResponse

        def _new_conn(self):
            # Look at the address and connect to that very address: asked again, the name may point elsewhere.
            deadline = monotonic() + self.timeout
            failures, when = client.silent.get((self.host, self.port), (0, 0))
            if failures >= 3 and monotonic() - when < REMEMBER:
                raise Skip(f"dead host: {failures} connections to {self.host} failed before")
            failure = None
            for address in client.addresses(self._dns_host, self.timeout):
                try:
                    left = max(deadline - monotonic(), 0.001)
                    connection = create_connection((address, self.port), left, socket_options=self.socket_options)
                    client.silent.pop((self.host, self.port), None)
                    return connection
                except OSError as error:
                    failure = error
            client.silent[self.host, self.port] = failures + 1, monotonic()
            raise Skip("timeout" if isinstance(failure, TimeoutError) else f"dead host: {failure.strerror}")

    return Guarded


class TimedResponse(http.client.HTTPResponse):
    """An answer whose header and body must arrive within the socket's timeout, however small the drops they come in."""

    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(TimedStream(sock, self.fp.detach()))


class TimedStream(io.RawIOBase):
    def __init__(self, sock, raw):
        self.sock, self.raw, self.deadline = sock, raw, monotonic() + sock.gettimeout()

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(max(self.deadline - monotonic(), 0.001))
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


def look_up(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno != socket.EAI_AGAIN:
            raise
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(address[0] for *_, address in found))


def is_public(address: str) -> bool:
    """Whether an address belongs to the open internet: not loopback, private, link-local, reserved or multicast."""
    ip = ipaddress.ip_address(address)
    inner = [ip]
    if ip.version == 6:  # an IPv4 address in one of its IPv6 disguises is reached all the same
        inner = [ip.ipv4_mapped or ip, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.ip_address(int(ip) & 0xFFFFFFFF))
    return all(
        i.is_global and not i.is_multicast and not any(i.version == n.version and i in n for n in NOT_PUBLIC)
        for i in inner
        if i is not None
    )


def read_body(response: urllib3.HTTPResponse, max_bytes: int) -> bytes:
    blocks, size = [], 0
    if response.length_remaining is not None and response.length_remaining > max_bytes:
        raise Skip("too large: see --max_bytes")
    for block in response.stream(262144, decode_content=False):
        blocks.append(block)
        size += len(block)
        if size > max_bytes:
            raise Skip("too large: see --max_bytes")
    return b"".join(blocks)


def opted_out(headers) -> bool:
    """Whether an answer asks machines to keep off. `otherbot: noindex` is meant for another machine than this."""
    for directive in headers.get("X-Robots-Tag", "").lower().split(","):
        agent, _, rule = directive.rpartition(":")
        if rule.strip() in OPT_OUT and agent.strip() in ("", "*", "align_sd"):
            return True
    return False


def retry_after(headers) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Many at once


class Host:
    def __init__(self, name: str):
        self.name, self.waiting, self.active, self.strikes, self.opens = name, deque(), 0, 0, 0.0

    def pause(self, wait: float | None) -> None:
        """Stay away for as long as the host says, or for a while that doubles with each time it says nothing."""
        if wait is None and monotonic() >= self.opens:  # the others that were under way count as the same time
            wait = BACK_OFF * 2**self.strikes * random.uniform(0.75, 1.25)
            self.strikes += 1
        # A day is far beyond MAX_WAIT already; some servers ask for millennia, which no clock can count to.
        self.opens = max(self.opens, monotonic() + min(wait or 0, 86400))


class Job:
    def __init__(self, host: Host, what):
        self.host, self.what, self.attempts, self.outcome = host, what, 0, None


def in_order(
    jobs: Iterable[tuple[str, object]],
    fetch: Callable,
    process: Callable,
    num_workers: int,
    per_host: int,
    window: Callable[[], int],
) -> Iterator[tuple]:
    """Yield (job, process(job, fetch(job))) for each (host, job), in the jobs' order; or a Skip that one of the two raised.

    `fetch` runs in `num_workers` threads, at most `per_host` at once for one host; when it raises Later, nobody goes to
    that host for a while, and the job is tried again, up to four times. `process` runs in a thread a processor.
    A job that takes long holds back those behind it, so `window()` jobs may be under way: between the first that is not
    yet yielded and the last that was begun.
    """
    hosts, pending, answers, clock = {}, deque(), SimpleQueue(), []
    tie = itertools.count()  # heapq would compare hosts otherwise
    jobs = iter(jobs)
    fetchers = ThreadPoolExecutor(num_workers, thread_name_prefix="fetch")
    processors = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="process")
    room = threading.Semaphore(4 * num_workers)  # what was fetched and not yet processed lies in memory
    stopped = threading.Event()

    def fetch_one(job):
        room.acquire()
        if stopped.is_set():
            raise Skip("stopped")
        return fetch(job)

    def start(host):
        closed = host.opens - monotonic()
        while host.waiting and closed > MAX_WAIT:
            host.waiting.popleft().outcome = Skip(f"busy host: it asked to be left alone for {closed:.0f} s")
        while host.waiting and host.active < per_host and closed <= 0:
            job = host.waiting.popleft()
            host.active += 1
            submit(job, fetched, fetchers, fetch_one, job.what)

    def submit(job, then, pool, function, *args):
        pool.submit(function, *args).add_done_callback(lambda future: answers.put((then, job, future)))

    def fetched(job, future):
        host, error = job.host, future.exception()
        host.active -= 1
        if isinstance(error, Later):
            host.pause(error.wait)
            heapq.heappush(clock, (host.opens, next(tie), host))
            job.attempts += 1
        else:
            host.strikes = 0
        if isinstance(error, Later) and job.attempts < ATTEMPTS:
            room.release()
            host.waiting.appendleft(job)
        elif error is None:
            submit(job, processed, processors, process, job.what, future.result())
        else:
            processed(job, future)
        start(host)
        if not (host.active or host.waiting or host.strikes) and host.opens <= monotonic():
            hosts.pop(host.name, None)  # a table may name a million

    def processed(job, future):
        room.release()
        job.outcome = future.exception()
        if not isinstance(job.outcome, Skip):
            job.outcome = future.result()  # which raises what is a defect of ours

    try:
        more = True
        while more or pending:
            # Begin what there is room for.
            while more and len(pending) < window() and answers.empty():
                name, what = next(jobs, (None, jobs))
                if what is jobs:
                    more = False
                    break
                host = hosts.get(name) or hosts.setdefault(name, Host(name))
                job = Job(host, what)
                pending.append(job)
                host.waiting.append(job)
                start(host)
            # Take note of what has come in, and of hosts that may be asked again.
            block = bool(pending) and pending[0].outcome is None and (not more or len(pending) >= window())
            try:
                while True:
                    then, job, future = answers.get(block, max(clock[0][0] - monotonic(), 0) if clock else None)
                    then(job, future)
                    block = False
            except Empty:
                pass
            while clock and clock[0][0] <= monotonic():
                start(heapq.heappop(clock)[2])
            while pending and pending[0].outcome is not None:
                job = pending.popleft()
                yield job.what, job.outcome
    finally:
        stopped.set()
        room.release(num_workers)
        fetchers.shutdown(cancel_futures=True)
        processors.shutdown(cancel_futures=True)
