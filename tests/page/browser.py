"""A headless Chromium, driven by its DevTools protocol: no more of it than the tests of the page need."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One browser with one tab. Collects what the page asks for and what goes wrong in it."""

    def __init__(self):
        binary = next(filter(None, map(shutil.which, NAMES)), None)
        if binary is None:
            raise RuntimeError("no chromium: install it with apt-get install chromium")
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={self.profile.name}", "--disable-gpu",
                 "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking",
                 "--disable-component-update", "--remote-allow-origins=*"]
        if os.geteuid() == 0:
            # In containers everybody is root, whom Chromium gives no sandbox.
            flags.append("--no-sandbox")
        self.process = subprocess.Popen([binary, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self.wait_for_port()
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20))
        tab = next(tab for tab in tabs if tab["type"] == "page")
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        self.ids = itertools.count(1)
        self.requests, self.problems = [], []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def wait_for_port(self):
        path = os.path.join(self.profile.name, "DevToolsActivePort")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"chromium ended with {self.process.returncode}")
            try:
                with open(path, encoding="ascii") as file:
                    return int(file.readline())
            except (FileNotFoundError, ValueError):
                time.sleep(0.05)
        raise RuntimeError("chromium did not start within 60 s")

    def close(self):
        try:
            self.call("Browser.close")
        except (OSError, websocket.WebSocketException):
            pass
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.socket.close()
        self.profile.cleanup()

    def call(self, method, **params):
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.note(message)

    def note(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append((params["request"]["url"], params["request"].get("headers", {})))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str([arg.get("value") for arg in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def js(self, expression):
        """The value of an expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, expression, seconds=60):
        """The first true value of an expression."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.js(expression)
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds} s: {expression}\n{self.js('document.body.innerText')}")
            time.sleep(0.1)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def size(self, width, height, phone=False, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def key(self, name, text=None):
        """One key pressed and released, as a keyboard does it."""
        codes = {"Tab": 9, "Enter": 13, "Backspace": 8, " ": 32}
        code = codes.get(name, ord(name.upper()) if len(name) == 1 else 0)
        text = text if text is not None else {"Enter": "\r", "Tab": None}.get(name, name if len(name) == 1 else None)
        down = {"key": name, "windowsVirtualKeyCode": code, "code": "Space" if name == " " else name}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **down, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **down)

    def type(self, text):
        for character in text:
            self.key(character)

    def picture(self, path, whole=True, quality=None):
        params = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            params["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot", **params)["data"]))
