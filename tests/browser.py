"""A headless Chromium, driven over the pipe of its DevTools protocol: what a person sees and does in a page.

`apt-get install chromium` gives one; CHROMIUM says where another is.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ANSWER_S = 60.0


def find_browser() -> str:
    """Skips the test where there is none."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, or set CHROMIUM to where one is")
    return found


class NavigatedError(Exception):
    """The page that a command was for has gone."""


class Page:
    """One tab."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._rest, self._count = into, out, b"", 0
        self._session: str | None = None
        self.faults: list[str] = []  # exceptions and errors of the page
        self.requests: list[str] = []  # addresses that the page asked for
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer and "navigated" in answer["error"]["message"]:
                    raise NavigatedError(method)
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        """The next message; events are noted on the way."""
        end = time.monotonic() + _ANSWER_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self._out, 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        given = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.faults.append(details.get("exception", {}).get("description") or details["text"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        return message

    def open(self, path: Path, view: str = "", *, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Load a file, and wait until it says that it is ready."""
        self.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.do("(() => { try { sessionStorage.clear() } catch {} })()")  # a blank page has none
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"{path.resolve().as_uri()}{view and '#/'}{view}")
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def size(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def do(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is there."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (script, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(NavigatedError):  # the next page is asked
                if self.do(f"Boolean({condition})"):
                    return
            assert time.monotonic() < end, f"not so after {seconds} s: {condition}; {self.faults}"
            time.sleep(0.02)

    def on(self, selector: str, function: str, *arguments: Any) -> Any:
        """The value of a JavaScript function of the first element of `selector`, and of `arguments`."""
        given = "".join(f", {json.dumps(argument)}" for argument in arguments)
        return self.do(f"({function})(document.querySelector({json.dumps(selector)}){given})")

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the first element of `selector`."""
        self.on(selector, "own => own.scrollIntoView({block: 'center'})")
        box = self.on(selector, "own => own.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Into a field, in place of what is there."""
        self.on(selector, "own => {own.focus(); own.select()}")
        if text:
            self.send("Input.insertText", text=text)
        else:
            self.on(selector, "own => {own.value = ''; own.dispatchEvent(new Event('input'))}")

    def choose(self, selector: str, label: str) -> None:
        """An option of a select by its text."""
        self.on(
            selector,
            "(own, label) => {own.value = [...own.options].find(one => one.text.trim() === label).value;"
            " own.dispatchEvent(new Event('change', {bubbles: true}))}",
            label,
        )

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser whose profile is in `folder`, with no network."""
    program = find_browser()
    commands, into = os.pipe()
    out, answers = os.pipe()
    process = subprocess.Popen(
        [
            "bash", "-c", 'exec "$@" 3<&"$0" 4>&"$ANSWERS"', str(commands),
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
            "--remote-debugging-pipe", f"--user-data-dir={folder}",
        ],
        pass_fds=(commands, answers), env={**os.environ, "ANSWERS": str(answers)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(commands)
    os.close(answers)
    try:
        yield Page(into, out)
    finally:
        process.terminate()  # so that it removes what it has in the system's temporary folder
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(into)
        os.close(out)
