"""A headless Chromium, controlled through its driver with the WebDriver protocol (W3C), and a file server for it."""

import base64
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.cli.test_serve_command import free_port

# With these switches, the browser sends no requests of its own accord.
_SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


class Browser:
    """One window.

    Args:
        url: URL of its session at the driver.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, url: str) -> None:
        """Load a page."""
        ask(f"{self._url}/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run a script as the body of an asynchronous function, and return its result; see `timeouts.script`."""
        body = (
            "const done = arguments[0]; (async () => {" + script + "})().then(done, (e) => done({failed: String(e)}))"
        )
        return ask(f"{self._url}/execute/async", {"script": body, "args": []})

    def picture(self, path: Path) -> None:
        """Save a screenshot of the window as PNG."""
        path.write_bytes(base64.b64decode(ask(f"{self._url}/screenshot")))


def ask(url: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    """Send a request to the driver, and return the value in its answer."""
    request = Request(url, None if body is None else json.dumps(body).encode(), method=method)
    with closing(urlopen(request, timeout=180)) as answer:
        return json.load(answer)["value"]


@contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """Open a window of the given size in pixels, with its own profile."""
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is not installed; in Debian, apt-get install chromium chromium-driver"
    port, profile = free_port(), tempfile.mkdtemp()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while "started successfully" not in (line := process.stdout.readline()):
            assert line, "chromedriver ended"
        switches = [*_SWITCHES, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        wanted = {"goog:chromeOptions": {"args": switches}, "timeouts": {"script": 120_000}}
        session = ask(f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": wanted}})
        url = f"http://127.0.0.1:{port}/session/{session['sessionId']}"
        try:
            yield Browser(url)
        finally:
            ask(url, method="DELETE")
    finally:
        process.terminate()
        process.communicate()
        shutil.rmtree(profile, ignore_errors=True)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder on the loopback interface; yields its address and the paths that were requested."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
