"""Pages in a headless Chromium, driven by its DevTools protocol: what they print, request, show and do."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--autoplay-policy=no-user-gesture-required"),
)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowLeft": (37, ""), "ArrowRight": (39, "")}  # code, text
STARTS_IN_S = 120.0
LOADS_IN_S = 120.0


class Browser:
    """One tab. requests: URLs that pages asked for. problems: errors of scripts, and what the console shows as one."""

    def __init__(self, port: int):
        import aiohttp

        self._loop = asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(self._made(aiohttp))
        pages = self._loop.run_until_complete(self._get(f"http://127.0.0.1:{port}/json"))
        url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._socket = self._loop.run_until_complete(self._session.ws_connect(url, max_msg_size=0))
        self._number = 0
        self._loaded = False
        self.requests: list[str] = []
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    @staticmethod
    async def _made(aiohttp: Any) -> Any:
        return aiohttp.ClientSession()

    async def _get(self, url: str) -> Any:
        async with self._session.get(url) as answer:
            return await answer.json()

    def call(self, method: str, **parameters: Any) -> Any:
        """The answer of a DevTools method. Raises RuntimeError if it refuses."""
        return self._loop.run_until_complete(self._call(method, parameters))

    async def _call(self, method: str, parameters: dict[str, Any]) -> Any:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive(timeout=LOADS_IN_S)).data)
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, said = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(said["exceptionDetails"])[:1000])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(said["args"])[:1000])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(said["entry"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a page and waits until it is loaded. width, height: in CSS pixels."""
        self.requests.clear()
        self.problems.clear()
        self._loaded = False
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; waits for a promise. Raises RuntimeError if it throws."""
        given = {"expression": script, "awaitPromise": True, "returnByValue": True}
        answer = self.call("Runtime.evaluate", **given)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = LOADS_IN_S) -> None:
        """Waits until the expression is true. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(f"not true after {seconds:g} s: {script}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """key: a letter, or one of KEYS."""
        code, text = KEYS.get(key, (ord(key[0].upper()), key))
        for kind in ("keyDown", "keyUp"):
            given = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **given)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile. Raises TimeoutError if it does not start."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            browser = Browser(_port(Path(profile) / "DevToolsActivePort"))
            yield browser
            browser.close()
        finally:
            process.terminate()
            process.wait(timeout=60)


def _port(file: Path) -> int:
    end = time.monotonic() + STARTS_IN_S
    while not (file.exists() and "\n" in file.read_text()):
        if time.monotonic() > end:
            raise TimeoutError(f"Chromium has not started within {STARTS_IN_S:g} s")
        time.sleep(0.1)
    return int(file.read_text().splitlines()[0])
