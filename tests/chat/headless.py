"""A browser driven over plain WebDriver requests, without a library."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stand_ins import wait_until

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's id in WebDriver's answers, the same in every browser."""


class Browser:
    """A headless Chromium, driven through chromedriver.

    Source: the W3C recommendation WebDriver.
    """

    def __init__(self, driver_url: str, *arguments: str) -> None:
        self._driver_url = driver_url
        options = {"binary": shutil.which("chromium"), "args": list(arguments)}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        answer = self._call("POST", "/session", {"capabilities": wanted})
        self._session = f"/session/{answer['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._driver_url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()[:600]}") from None

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script's body in the page, and give what it returns."""
        body = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def _element(self, selector: str) -> str:
        body = {"using": "css selector", "value": selector}
        element: str = self._call("POST", f"{self._session}/element", body)[_ELEMENT]
        return f"{self._session}/element/{element}"

    def type(self, selector: str, text: str) -> None:
        self._call("POST", f"{self._element(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self._call("POST", f"{self._element(selector)}/click", {})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def console(self) -> list[str]:
        """Give what the page has complained of: errors of scripts, refusals by its policy."""
        entries = self._call("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def emulate(self, **changes: Any) -> None:
        """Set size and colour scheme of the page as on another device."""
        size = {"width": changes["width"], "height": changes["height"]}
        metrics = {**size, "deviceScaleFactor": 1, "mobile": changes["width"] < 600}
        scheme = [{"name": "prefers-color-scheme", "value": changes.get("scheme", "light")}]
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        self._devtools("Emulation.setEmulatedMedia", {"features": scheme})

    def _devtools(self, command: str, parameters: Any) -> None:
        body = {"cmd": command, "params": parameters}
        self._call("POST", f"{self._session}/goog/cdp/execute", body)

    def close(self) -> None:
        self._call("DELETE", self._session)


@contextmanager
def headless_browser(profile: Path) -> Iterator[Browser]:
    """Start chromedriver and a Chromium with an empty profile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listening, "chromedriver")
        browser = Browser(
            f"http://127.0.0.1:{port}",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-proxy-server",
            f"--user-data-dir={profile}",
        )
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(timeout=10)
