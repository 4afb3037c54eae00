"""A real browser without a window, spoken to through two pipes in the DevTools protocol: a Chromium of any origin."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from patience import PATIENCE

OURS = Path(sys.prefix) / "browser"  # what `make .venv/browser` unpacks
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers let nobody make the namespaces that it wants
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)


def find():
    """The command of a browser: one on PATH, else the one beside the other tools; None where there is neither."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    ours = OURS / "chromium"
    return found or (str(ours) if ours.exists() else None)


class Browser:
    """One process with one page.

    Attributes:
        console: what the page wrote there, and what went wrong in it, as text.
        requests: every address that it asked for.
    """

    def __init__(self, command):
        self._profile = tempfile.TemporaryDirectory()
        environment = {**os.environ, "HOME": self._profile.name, "XDG_CACHE_HOME": self._profile.name}
        libraries = Path(command).parent / "lib"
        if Path(command).parent == OURS:
            environment |= {"LD_LIBRARY_PATH": str(libraries), "FONTCONFIG_PATH": str(OURS)}
        there_read, self._write = os.pipe()
        self._read, there_write = os.pipe()

        def as_3_and_4():
            low, high = os.dup(there_read), os.dup(there_write)  # neither is where the other has to go
            os.dup2(low, 3)
            os.dup2(high, 4)

        self._process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={self._profile.name}/profile", "about:blank"],
            env=environment,
            preexec_fn=as_3_and_4,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there_read)
        os.close(there_write)
        self._left, self._last, self._answers, self._loaded = b"", 0, {}, False
        self.console, self.requests = [], []
        pages = self._call("Target.getTargets", browser=True)["targetInfos"]
        page = next(each["targetId"] for each in pages if each["type"] == "page")
        self._session = None
        self._session = self._call("Target.attachToTarget", browser=True, targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path, *, width=1200, height=900, dark=False, phone=False):
        """Load a file, and wait until it is there."""
        self.resize(width, height, phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self._loaded, self.console, self.requests = False, [], []
        self._call("Page.navigate", url=Path(path).resolve().as_uri())
        while not self._loaded:
            self._receive()

    def resize(self, width, height, phone=False):
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def run(self, script):
        """The value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"in the page: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def move(self, x, y):
        """The mouse, to a place of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, whole=False):
        """PNG bytes of the window, or of the whole page."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def _call(self, method, browser=False, **params):
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if not browser:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._last
        while number not in self._answers:
            self._receive()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self):
        """One message, or an error when none comes."""
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._left:
            if not select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise AssertionError("the browser does not answer")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise AssertionError(f"the browser has ended with status {self._process.wait()}")
            self._left += data
        text, self._left = self._left.split(b"\0", 1)
        message = json.loads(text)
        if "id" in message:
            self._answers[message["id"]] = message
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.consoleAPICalled":
                self.console.append(" ".join(str(each.get("value")) for each in params["args"]))
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
