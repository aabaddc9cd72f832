"""utils/web.py against servers on 127.0.0.1 that do what they should not, and against names that resolve as they please."""

import gzip
import itertools
import socket
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from server import CERTIFICATE, Web, drip, endless

from utils import web as module
from utils.web import Client, Host, Later, Skip, in_order, is_public, opted_out, retry_after


@pytest.fixture
def web():
    web = Web()
    yield web
    web.close()


@pytest.fixture
def names(monkeypatch):
    """Names that resolve to what the test says, one list of addresses after the other; the last for ever."""
    known, resolve = {}, socket.getaddrinfo

    def resolver(host, *args, **kwargs):
        if host not in known:
            return resolve(host, *args, **kwargs)
        answers = known[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [answer for address in found for answer in resolve(address, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    return known


def open_client(num_workers=8, per_host=8, allow_private=True):
    return Client(num_workers, per_host, allow_private)


def reason(url, client=None, timeout=30, max_bytes=10**6) -> str:
    with pytest.raises(Skip) as caught:
        (client or open_client()).fetch(url, timeout, max_bytes)
    return str(caught.value)


def ask(urls, client=None, num_workers=8, per_host=8, window=lambda: 1000) -> list:
    """Fetch (host, url) pairs at once; return the lengths of the bodies, and the reasons where there is none."""
    client = client or open_client(num_workers, per_host)
    found = in_order(
        urls, lambda url: client.fetch(url, 30, 10**6), lambda url, body: len(body), num_workers, per_host, window
    )
    return [outcome if isinstance(outcome, int) else str(outcome) for _, outcome in found]


# ---------------------------------------------------------------------------------------------------------------------
# Safety


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("::1", False),
        ("224.0.0.1", False), ("fe80::1%2", False), ("::ffff:8.8.8.8", True), ("::ffff:224.0.0.1", False), ("fd00::1", False),
        ("::ffff:10.0.0.1", False), ("::", False), ("fd00:ec2::254", False), ("100.100.100.200", False), ("192.0.0.192", False),
        ("64:ff9b::808:808", True), ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False),
        ("255.255.255.255", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_private_addresses_are_refused_whatever_their_name(web, names):
    web.add("/a.png", b"secret")
    names["innocent.example"] = [["8.8.8.8", "127.0.0.1"]]
    hosts = ["127.0.0.1", "localhost", "10.0.0.1", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "innocent.example"]
    hosts += ["2130706433", "0x7f.1", "127.1"]  # 127.0.0.1 as inet_aton reads it
    client = open_client(allow_private=False)
    for host in hosts:
        assert reason(f"http://{host}:{web.port}/a.png", client).startswith("refused address"), host
    assert reason("http://169.254.169.254/latest/meta-data", client).startswith("refused address")
    assert web.asked == [] and web.connections == 0


def test_the_connection_goes_to_the_address_that_was_looked_at(web, names, monkeypatch):
    connected = []

    def connect(address, *args, **kwargs):
        connected.append(address[0])
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(module, "create_connection", connect)
    names["rebound.example"] = [["8.8.8.8"], ["127.0.0.1"]]
    url, client = f"http://rebound.example:{web.port}/a.png", open_client(allow_private=False)
    for _ in range(2):
        assert reason(url, client) == "dead host: refused"
    assert connected == ["8.8.8.8", "8.8.8.8"]
    # When the name is asked again, its new address is looked at again.
    monkeypatch.setattr(module, "REMEMBER", -1)
    assert reason(url, client).startswith("refused address: rebound.example is 127.0.0.1")
    assert len(connected) == 2


def test_redirects_are_looked_at_like_addresses(web, monkeypatch):
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
    client = open_client(allow_private=False)
    web.add("/picture", b"picture")

    def moved(location, status=302):
        return lambda handler: handler.answer(status, b"moved", Location=location)

    for target, said in [
        (f"http://127.0.0.2:{web.port}/picture", "refused address"),
        ("http://169.254.169.254/latest", "refused address"),
        ("file:///etc/hostname", "not an http(s) address"),
        ("ftp://127.0.0.1/picture", "not an http(s) address"),
        ("gopher://127.0.0.1/picture", "not an http(s) address"),
        ("http://[bad/picture", "not an http(s) address"),
    ]:
        assert reason(web.add("/to", moved(target)), client).startswith(said), target
    for hop in range(6):
        web.add(f"/hop{hop}", moved(f"/hop{hop - 1}" if hop else "picture", 301 + hop % 2))
    assert client.fetch(web.url + "/hop4", 30, 1000) == b"picture"  # five redirects
    assert reason(web.url + "/hop5", client) == "too many redirects"
    assert reason(web.add("/loop", moved("/loop")), client) == "too many redirects"
    noindex = web.add("/noai", lambda h: h.answer(302, Location="/picture", X_Robots_Tag="noai"))
    assert reason(noindex, client).startswith("opted out")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1/a",
        "file:///etc/hostname",
        "http://[bad/a",
        "http://",
        "javascript:1",
        "http://a b/",
        "http://\u2100.example/",
    ],
)
def test_what_is_no_address(url):
    assert reason(url).split(":")[0] in ("not an http(s) address", "dead host")


def test_slow_and_dripping_servers_are_cut_off(web):
    pages = [
        lambda handler: web.gate.wait(20),
        drip(web, b"HTTP/1.1 200 OK\r\nX-Slow: "),
        drip(web, b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"),
        drip(web, b"HTTP/1.1 200 OK\r\n\r\n"),
        drip(web, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5"),
        drip(web, b"HTTP/1.1 404 Not Found\r\nContent-Length: 5000\r\n\r\n"),
        lambda handler: (time.sleep(0.4), handler.answer(302, Location="/6")),  # each is fast enough, all are not
        lambda handler: handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n") and drip(web, b"HTTP/1.1 100 ")(handler),
    ]
    client, said = open_client(), {}

    def fetch(i):
        said[i] = reason(web.url + f"/{i}", client, timeout=1)

    for i, page in enumerate(pages):
        web.add(f"/{i}", page)
    threads = [threading.Thread(target=fetch, args=(i,)) for i in range(len(pages))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)  # the slowest of the pages would take 10 s more
    assert said == dict.fromkeys(range(len(pages)), "timeout")


def test_a_slow_resolver_counts_too(names, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: gate.wait(20))
    assert reason("http://slow.example/", timeout=0.3) == "timeout"
    gate.set()


def test_bodies_are_bounded_and_never_unpacked(web):
    fits = b"x" * 5000
    assert open_client().fetch(web.add("/fits", fits), 30, 5000) == fits
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for page in [
        fits + b"x",
        lambda handler: handler.answer(200, b"", 10**12),  # it is refused before a byte of it comes
        endless(web),
        endless(web, chunked, b"10\r\n" + b"x" * 16 + b"\r\n"),
    ]:
        assert reason(web.add("/more", page), max_bytes=5000).startswith("too large")
    assert reason(web.add("/line", endless(web, chunked + b"5;")), timeout=20).startswith("broken connection")
    assert reason(web.add("/header", endless(web, b"HTTP/1.1 200 OK\r\nX: ")), timeout=20).startswith(
        "broken connection"
    )
    bomb = gzip.compress(bytes(10**7))
    url = web.add("/bomb", lambda handler: handler.answer(200, bomb, Content_Encoding="gzip"))
    assert open_client().fetch(url, 30, 10**6) == bomb
    assert {headers["Accept-Encoding"] for headers in web.headers} == {"identity"}


def test_https_is_checked_against_the_name_not_the_address(names, monkeypatch):
    secure = Web(tls=True)
    secure.add("/a.png", b"picture")
    secure.add("/slow.png", drip(secure, b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"))
    names["pictures.example"] = names["other.example"] = [["127.0.0.1"]]
    url = f"https://pictures.example:{secure.port}/a.png"
    try:
        assert reason(url) == "broken connection: SSLError"  # nobody whom we know has signed it
        monkeypatch.setattr(module.certifi, "where", lambda: str(CERTIFICATE))
        client = open_client()
        for _ in range(3):
            assert client.fetch(url, 30, 1000) == b"picture"
        assert len(secure.asked) == 3
        assert reason(url.replace("/a", "/slow"), client, timeout=1) == "timeout"
        assert reason(url.replace("pictures", "other"), client) == "broken connection: SSLError"
    finally:
        secure.close()


# ---------------------------------------------------------------------------------------------------------------------
# Politeness


@pytest.mark.parametrize(
    ("header", "out"),
    [
        ("noai", True), ("NOIMAGEAI", True), ("all, noindex", True), ("noimageindex", True), ("none", True),
        ("align_sd: noai", True), ("*: noindex", True), ("otherbot: noindex", False), ("nofollow, noarchive", False),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", False), ("otherbot: nofollow, noai", True), ("", False),
    ],
)  # fmt: skip
def test_opting_out(header, out):
    assert opted_out({"X-Robots-Tag": header}) is out


def test_an_opt_out_in_any_of_several_headers_counts(web):
    def page(handler):
        handler.send_response(200)
        for value in ("otherbot: noindex", "noarchive", "noimageai"):
            handler.send_header("X-Robots-Tag", value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    assert reason(web.add("/a", page)) == "opted out: X-Robots-Tag"


def test_retry_after_is_a_number_or_a_date():
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    assert retry_after({"Retry-After": "120"}) == 120
    assert 85 < retry_after({"Retry-After": date}) <= 90
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    for nonsense in ("", "soon", "-5", "1e3"):
        assert retry_after({"Retry-After": nonsense}) is None


def test_connections_are_kept_and_names_looked_up_once(web, monkeypatch):
    lookups, resolve = [], socket.getaddrinfo

    def resolver(host, *args, **kwargs):
        lookups.append(host)
        return resolve("127.0.0.1" if host == "kept.example" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    client = open_client()
    web.add("/a", b"picture" * 10_000)
    web.add("/moved", lambda handler: handler.answer(301, b"moved", Location="/a"))
    for path in ("/a", "/gone", "/moved", "/a"):
        try:
            assert client.fetch(f"http://kept.example:{web.port}{path}", 30, 10**6) == b"picture" * 10_000
        except Skip as skip:
            assert path == "/gone" and str(skip) == "HTTP 404"
    assert web.asked == ["/a", "/gone", "/moved", "/a", "/a"]
    assert web.connections == 1
    assert lookups.count("kept.example") == 1


def test_a_proxy_is_used_where_one_is_set(web, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    web.pages["http://far.example/a.png"] = b"through the proxy"
    web.add("/a.png", b"directly")
    client = open_client()
    assert client.fetch("http://far.example/a.png", 30, 1000) == b"through the proxy"
    assert client.fetch(web.url + "/a.png", 30, 1000) == b"directly"


def test_a_connection_that_went_stale_is_made_anew(web):
    def hangs_up(handler):
        handler.answer(200, b"picture")
        handler.close_connection = True  # without having said so

    client, url = open_client(), web.add("/a", hangs_up)
    for _ in range(5):
        assert client.fetch(url, 30, 1000) == b"picture"
    web.add("/mute", lambda handler: setattr(handler, "close_connection", True))
    assert reason(web.url + "/mute").startswith("broken connection")
    assert web.asked.count("/mute") == 2  # not for ever


def test_hosts_that_do_not_answer_are_left_alone(web, names):
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    url, client = f"http://127.0.0.1:{closed.getsockname()[1]}/a", open_client()
    said = [reason(url, client) for _ in range(5)]
    assert said[:3] == ["dead host: Connection refused"] * 3
    assert said[3:] == ["dead host: 3 connections to 127.0.0.1 failed before"] * 2
    closed.close()
    assert client.fetch(web.add("/a", b"x"), 30, 9) == b"x"  # the same machine, another server
    names["nowhere.example"] = [[]]
    assert reason("http://nowhere.example/a", client) == "dead host: no such name as nowhere.example"


def test_no_more_than_so_many_connections_to_one_host(web, names):
    names["slow.example"] = names["fast.example"] = [["127.0.0.1"]]
    release = threading.Event()
    web.add("/slow", lambda handler: (release.wait(20), handler.answer(200, b"slow")))

    def fast(handler):
        handler.answer(200, b"fast!")
        if web.asked.count("/fast") == 40:
            release.set()  # the fast host has not waited for the slow one

    web.add("/fast", fast)
    urls = [("slow.example", f"http://slow.example:{web.port}/slow")] * 30
    urls += [("fast.example", f"http://fast.example:{web.port}/fast")] * 40
    assert ask(urls, num_workers=8, per_host=3) == [4] * 30 + [5] * 40
    assert release.is_set() and web.most_active <= 6 and web.connections <= 6


def test_redirects_do_not_get_around_the_limit(web):
    web.add("/a", lambda handler: (time.sleep(0.02), handler.answer(200, b"a")))
    web.add("/to", lambda handler: handler.answer(302, Location=f"http://localhost:{web.port}/a"))
    assert ask([(str(i), web.url + "/to") for i in range(20)], num_workers=10, per_host=2) == [1] * 20
    assert web.most_active <= 4 and web.connections <= 4  # two to 127.0.0.1 and two to localhost


def test_a_wait_of_millennia_is_one_that_clocks_can_count():
    host = Host("example.com")
    host.pause(float("9" * 12))
    assert 86_000 < host.opens - time.monotonic() <= 86_400


def test_retry_after_is_respected(web, names):
    names["busy.example"] = names["free.example"] = [["127.0.0.1"]]
    refused = []

    def busy(handler):
        if not refused:
            refused.append(time.monotonic())
            handler.answer(429, b"slow down", Retry_After="2")
        else:
            handler.answer(200, b"busy")

    web.add("/busy", busy)
    web.add("/free", b"free!")
    urls = [("busy", f"http://busy.example:{web.port}/busy")] * 6 + [
        ("free", f"http://free.example:{web.port}/free")
    ] * 6
    assert ask(urls, per_host=1) == [4] * 6 + [5] * 6
    again = [at for path, at in zip(web.asked, web.times, strict=True) if path == "/busy"][1:]
    assert len(again) == 6 and min(again) >= refused[0] + 2
    assert max(at for path, at in zip(web.asked, web.times, strict=True) if path == "/free") < refused[0] + 2


def test_busy_hosts_are_asked_again_and_others_never(web, monkeypatch):
    monkeypatch.setattr(module, "BACK_OFF", 0.1)
    statuses = {"/503": 503, "/429": 429, "/404": 404, "/403": 403, "/410": 410, "/500": 500, "/502": 502}
    for path, status in statuses.items():
        web.add(path, lambda handler, status=status: handler.answer(status))
    # A host of its own each, or one that is busy would keep the others waiting.
    assert ask([(path, web.url + path) for path in statuses]) == [f"HTTP {status}" for status in statuses.values()]
    assert {path: web.asked.count(path) for path in statuses} == {
        path: 4 if path in ("/503", "/429") else 1 for path in statuses
    }
    times = [at for path, at in zip(web.asked, web.times, strict=True) if path == "/503"]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(wait >= 0.1 * 2**i * 0.75 for i, wait in enumerate(waits)), waits


def test_a_host_that_wants_to_be_left_alone_for_long_is(web):
    web.add("/later", lambda handler: handler.answer(503, Retry_After="3600"))
    web.add("/other", b"other")
    urls = [("busy", web.url + "/later")] * 20 + [("free", web.url + "/other")]
    said = ask(urls, per_host=1)
    assert web.asked.count("/later") == 1 and said[-1] == 5
    assert all(outcome.startswith("busy host: it asked to be left alone for 3") for outcome in said[:20])


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_outcomes_come_in_order_and_few_are_under_way():
    begun, gate = [], threading.Event()

    def fetch(i):
        begun.append(i)
        if i == 0:
            assert gate.wait(20)
        if i % 7 == 3:
            raise Skip("no")
        return i

    outcomes = in_order(((str(i % 5), i) for i in range(200)), fetch, lambda i, value: 2 * value, 4, 2, lambda: 20)
    threading.Timer(0.3, gate.set).start()
    assert next(outcomes) == (0, 0) and 15 < len(begun) <= 20
    assert [(i, str(outcome)) for i, outcome in outcomes] == [
        (i, "no" if i % 7 == 3 else str(2 * i)) for i in range(1, 200)
    ]
    assert sorted(begun) == list(range(200))


@pytest.mark.parametrize("where", ["fetch", "process"])
def test_a_defect_is_raised_not_counted(where):
    def broken(*_):
        raise ZeroDivisionError

    steps = [lambda i: i, lambda i, value: value]
    steps[where == "process"] = broken
    with pytest.raises(ZeroDivisionError):
        list(in_order([("a", 1)], *steps, 2, 2, lambda: 9))
    assert issubclass(Later, Skip)
