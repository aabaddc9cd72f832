"""A web server on 127.0.0.1 that does what the open web does: `web.add(path, page)`, then look at what was asked."""

import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CERTIFICATE = Path(__file__).with_name("pictures.example.pem")  # of that name, signed by itself, valid until 2126


class Web:
    """Pages by path: the body, or a function of the request's handler. `asked` lists the requests in order."""

    def __init__(self, tls=False):
        self.pages, self.asked, self.headers, self.times = {}, [], [], []
        self.connections = self.active = self.most_active = 0
        self.lock = threading.Lock()
        self.gate = threading.Event()  # what a page may wait for; opened when the test ends
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                web.connections += 1

            def do_GET(self):
                with web.lock:
                    web.asked.append(self.path)
                    web.headers.append(self.headers)
                    web.times.append(time.monotonic())
                    web.active += 1
                    web.most_active = max(web.most_active, web.active)
                page = web.pages.get(self.path)
                try:
                    if callable(page):
                        page(self)
                    else:
                        self.answer(404 if page is None else 200, page or b"gone")
                finally:
                    with web.lock:
                        web.active -= 1

            def answer(self, status, body=b"", length=None, **headers):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):
                pass  # a client that hangs up is what the tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, path, page) -> str:
        self.pages[path] = page
        return self.url + path

    def close(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


def drip(web, head: bytes):
    """Return a page that sends a byte every 50 ms: no silence is as long as any timeout."""

    def page(handler):
        handler.wfile.write(head)
        for _ in range(200):
            web.gate.wait(0.05)
            handler.wfile.write(b"a")
        handler.close_connection = True

    return page


def endless(web, head: bytes = b"HTTP/1.1 200 OK\r\n\r\n", block: bytes = b"a" * 65536):
    """Return a page that goes on for ever."""

    def page(handler):
        handler.wfile.write(head)
        while not web.gate.is_set():
            handler.wfile.write(block)

    return page
