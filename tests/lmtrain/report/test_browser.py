"""The page in a browser: no error on its console, no request, another look in the dark."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import SECONDS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed, so no browser has opened the report")
    return found


@pytest.fixture
def page(folder: Path) -> Path:
    return folder / "report.html"


def opened(browser: str, page: Path, *options: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The page, loaded in a browser of its own that can reach no host."""
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words += [f"--user-data-dir={home}", "--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True)


def test_no_console_message_and_no_request(browser: str, page: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    done = opened(browser, page, "--dump-dom", f"--log-net-log={log}", home=tmp_path / "home")
    assert "a&lt;b&gt;&amp;c" in done.stdout
    assert "CONSOLE" not in done.stderr
    assert requests_of(log, page) == set()


def test_a_page_that_errs_and_asks_is_caught(browser: str, tmp_path: Path) -> None:
    """The test above can fail: this page logs an error and asks for a picture."""
    log, page = tmp_path / "net.json", tmp_path / "bad.html"
    page.write_text('<body><img src="http://example.org/x.png"><script>throw new Error("oh")</script></body>')
    done = opened(browser, page, "--dump-dom", f"--log-net-log={log}", home=tmp_path / "home")
    assert "CONSOLE" in done.stderr
    assert requests_of(log, page) == {"http://example.org/x.png"}


def requests_of(log: Path, page: Path) -> set[str]:
    """Addresses that the page asked for; what the browser asks for itself names another initiator."""
    events = json.loads(log.read_text())["events"]
    parameters = [event.get("params", {}) for event in events]
    return {p["url"] for p in parameters if p.get("initiator") in ("file://", "null") and p["url"] != page.as_uri()}


def test_light_and_dark_differ_and_both_can_be_read(browser: str, page: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="reading screenshots needs matplotlib")
    brightness = []
    for number in (1, 0):  # of Chromium's preferredColorScheme: light, dark
        shot = tmp_path / f"{number}.png"
        scheme = f"--blink-settings=preferredColorScheme={number}"
        opened(browser, page, scheme, "--window-size=1200,900", f"--screenshot={shot}", home=tmp_path / f"home{number}")
        pixels = image.imread(shot)[..., :3].mean(-1)
        brightness.append(float(pixels.mean()))
        assert pixels.max() - pixels.min() > 0.6  # text stands out from paper
    assert brightness[0] > 0.8
    assert brightness[1] < 0.3
