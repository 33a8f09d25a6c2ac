"""A headless Chromium that tests drive over a pipe with Chrome's DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["PROGRAM", "Browser"]

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page of a new browser without any profile."""

    def __init__(self, folder: Path):
        """
        Args:
            folder: for the browser's files.
        """
        to_browser, self._requests = os.pipe()
        self._answers, from_browser = os.pipe()
        # The browser reads file descriptor 3 and writes 4.
        start = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += [
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
            "--no-first-run",
            "--hide-scrollbars",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", start, PROGRAM, *options, "about:blank"],
            env={**os.environ, "HOME": str(folder)},
            pass_fds=[to_browser, from_browser],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._id, self._session = b"", 0, None
        self.messages: list[str] = []  # of the console, and uncaught errors
        (target,) = [x for x in self("Target.getTargets")["targetInfos"] if x["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait()
        os.close(self._requests)
        os.close(self._answers)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._answers, 1 << 20)
                assert part, "the browser has ended"
                self._buffer += part
            text, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.messages.append(details.get("exception", details).get("description", str(details)))
        elif event.get("method") == "Log.entryAdded":
            self.messages.append(parameters["entry"]["text"])

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window; narrow ones are those of a phone."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def open(self, url: str) -> None:
        """Load a page."""
        self("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Run JavaScript, which may be a promise, and return its value."""
        result = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 20.0) -> None:
        """Wait until JavaScript gives true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.05)

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file of an ``<input type=file>``."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key.

        Args:
            key: its name, such as "Tab".
            code: its Windows virtual key code.
            text: that it types.
        """
        options = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown", text=text, **options)
        self("Input.dispatchKeyEvent", type="keyUp", **options)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag the mouse between two points of the window."""
        for kind, (x, y) in (("Pressed", start), ("Moved", end), ("Released", end)):
            options = {"button": "left", "buttons": 1, "clickCount": 1}
            self("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **options)

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """Write a PNG file of the whole page, or of what the window shows."""
        picture = self("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(picture["data"]))
