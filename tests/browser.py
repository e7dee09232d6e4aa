"""A page in headless Chromium, driven over DevTools: what it shows, what it complains of, what it asks for."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
_FLAGS += (
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


@dataclass
class Seen:
    """What a page did at one width.

    Attributes:
        value: of the expression that was asked for.
        complaints: errors and warnings in the console, and exceptions.
        requests: addresses asked for, but for the page itself and what it holds.
        screenshot: PNG.
    """

    value: Any = None
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    screenshot: bytes = b""


def look_at(page: Path, width: int, expression: str, profile: Path, *, dark: bool = False) -> Seen:
    """Load `page` in a window that is `width` pixels wide and evaluate `expression` in it."""
    assert CHROMIUM is not None
    browser = subprocess.Popen(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return asyncio.run(_look_at(page, width, expression, profile, dark))
    finally:
        browser.kill()
        browser.wait()


async def _look_at(page: Path, width: int, expression: str, profile: Path, dark: bool) -> Seen:
    port = _port(profile / "DevToolsActivePort")
    seen = Seen()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (target,) = [each for each in await answer.json(content_type=None) if each["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            call = _Calls(socket, seen, page.as_uri())
            for domain in ("Page", "Network", "Runtime", "Log"):
                await call(f"{domain}.enable")
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            await call("Emulation.setDeviceMetricsOverride", **metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await call("Emulation.setEmulatedMedia", features=[scheme])
            await call("Page.navigate", url=page.as_uri())
            await call.until("Page.loadEventFired")
            result = await call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
            seen.value = result["result"].get("value")
            picture = await call("Page.captureScreenshot", captureBeyondViewport=True)
            seen.screenshot = base64.b64decode(picture["data"])
    return seen


class _Calls:
    """Sends commands and notes down events on the way."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, seen: Seen, page: str) -> None:
        self.socket, self.seen, self.page, self.number, self.events = socket, seen, page, 0, set[str]()

    async def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while (message := await self._next()).get("id") != self.number:
            pass
        assert "error" not in message, message
        return message["result"]

    async def until(self, event: str) -> None:
        while event not in self.events:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads((await self.socket.receive(timeout=60)).data)
        method, params = message.get("method", ""), message.get("params", {})
        self.events.add(method)
        if method == "Network.requestWillBeSent":
            address = params["request"]["url"]
            if address != self.page and not address.startswith("data:"):
                self.seen.requests.append(address)
        elif method == "Runtime.exceptionThrown":
            self.seen.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.seen.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.seen.complaints.append(params["entry"]["text"])
        return message


def _port(file: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) >= 2:
            return int(lines[0])
        time.sleep(0.05)
    raise TimeoutError("Chromium did not start")
