"""A small client of Chromium's DevTools protocol: open a page, evaluate JavaScript in it, draw it as PNG."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    "Chromium's or Chrome's path: what CHROME names, or the first of the usual names."
    return os.environ.get("CHROME") or next((p for n in NAMES if (p := shutil.which(n))), None)


class Browser:
    """A headless browser with one page. Its console's errors and its failed requests gather in `errors`, the
    addresses of requests in `requests`."""

    def __init__(self, folder: Path, timeout: float = 300):
        import websocket  # of websocket-client, which jupyter-server needs, too

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-dev-shm-usage", "--remote-allow-origins=*"]
        flags += [f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
        self.process = subprocess.Popen(
            [find(), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.folder, self.timeout, self.n, self.errors, self.requests = folder, timeout, 0, [], []
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self._port()}/json/list", timeout=timeout
            ) as answer:
                page = next(t for t in json.load(answer) if t["type"] == "page")
            self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=timeout)
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _port(self) -> int:
        "The port that the browser has chosen. Raises TimeoutError."
        end = time.monotonic() + self.timeout
        while time.monotonic() < end and self.process.poll() is None:
            lines = (p := self.folder / "DevToolsActivePort").exists() and p.read_text().split()
            if lines:
                return int(lines[0])
            time.sleep(0.1)
        raise TimeoutError("the browser does not start")

    def call(self, method: str, **params) -> dict:
        "A command's result. Raises RuntimeError for a refused one."
        self.n += 1
        self.socket.send(json.dumps({"id": self.n, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.n:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._event(message)

    def _event(self, message: dict):
        kind, p = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = p["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Runtime.consoleAPICalled" and p["type"] == "error":
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in p["args"]))
        elif kind == "Log.entryAdded" and p["entry"]["level"] == "error":
            self.errors.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")
        elif kind == "Network.requestWillBeSent":
            self.requests.append(p["request"]["url"])

    def size(self, width: int, height: int):
        "What the page believes that the window is."
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, address: str):
        "Open a page and wait until it and its images have loaded."
        self.errors.clear()
        self.requests.clear()
        self.call("Page.navigate", url=address)
        self.until("document.readyState == 'complete' && location.href != 'about:blank'")

    def evaluate(self, script: str):
        "The value of a JavaScript expression; a promise is awaited. Raises RuntimeError for what it throws."
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", script))
        return answer["result"].get("value")

    def until(self, condition: str):
        "Wait for a JavaScript expression to be true. Raises TimeoutError."
        end = time.monotonic() + self.timeout
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise TimeoutError(condition)
            time.sleep(0.05)

    def screenshot(self, path: Path, whole: bool = False):
        "The page as PNG: the window's part, or `whole`."
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(picture["data"]))

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
