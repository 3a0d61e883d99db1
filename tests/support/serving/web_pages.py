"""Chat pages on the loopback interface, and a browser that looks at them."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import LIMITS, TEMPLATE, WAIT_S, running

from converter.cli.chat.chat_server import ChatServer
from converter.cli.chat.remote_chat import RemoteChat
from converter.cli.chat.web_page import WebPage
from loader.serving.answers.settings import GenerationSettings
from loader.serving.engine import Engine
from loader.serving.http.app import AppOptions, build_app
from loader.serving.http.server import Server, bound_socket, url_of

# Names other than 127.0.0.1 do not resolve: Chromium's own start page would ask for Google.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,800",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)


@contextlib.contextmanager
def page_of(engine: Engine, tokenizer: Any) -> Iterator[str]:
    """The URL of a page over the model "tiny" and its API, greedy, up to 64 tokens an answer."""
    listening = bound_socket("127.0.0.1", 0)
    url = url_of(listening)
    app = build_app(engine, tokenizer, AppOptions("tiny", template=TEMPLATE))
    remote = RemoteChat(ChatServer(url), "tiny", LIMITS.max_context)
    end_streams = WebPage(remote, GenerationSettings(temperature=0.0), 64).mount(app)
    with running(Server(app, engine, end_streams), listening):
        try:
            yield url
        finally:
            end_streams()


class Browser:
    """Headless Chromium with a new profile in `profile`. Skips the test where it is missing."""

    def __init__(self, profile: Path) -> None:
        webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if not (chromium and driver):
            pytest.skip("needs Debian's packages chromium and chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        self._driver = webdriver.Chrome(options=options, service=service)

    def open(self, url: str) -> None:
        """Open a page and wait until a message can be typed."""
        self._driver.get_log("performance")
        self._driver.get(url)
        self.wait_for(lambda: self._find(".submit-button"))

    def leave(self) -> None:
        """Leave the page."""
        self._driver.get("about:blank")

    def close(self) -> None:
        """End the browser."""
        self._driver.quit()

    @property
    def title(self) -> str:
        return str(self._driver.title)

    @property
    def answers(self) -> list[str]:
        """The texts of the answers, in order."""
        return [found.text for found in self._find('[data-testid="bot"]')]

    @property
    def text(self) -> str:
        """All visible text."""
        return str(self._find("body")[0].text)

    def send(self, text: str) -> None:
        """Type a message, send it, and wait until its answer begins."""
        from selenium.webdriver.common.keys import Keys

        before = len(self.answers)
        self._find("textarea")[0].send_keys(text, Keys.ENTER)
        self.wait_for(lambda: len(self.answers) > before and self.answers[-1])

    def stop(self) -> None:
        """Click Stop."""
        self.wait_for(lambda: self._find(".stop-button"))[0].click()

    def wait_for_end(self) -> None:
        """Wait until the answer has ended and a message can be typed."""
        self.wait_for(
            lambda: self._find(".submit-button") and self._find("textarea")[0].is_enabled()
        )

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Wait until `condition` returns a true value, and return it."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(
            self._driver, WAIT_S, 0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        return wait.until(lambda _: condition())

    def requests(self) -> list[str]:
        """The URLs that pages requested from the network since the last `open`."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")
        ]
        blocked = {
            message["params"]["requestId"]
            for message in messages
            if message["method"] == "Network.loadingFailed"
            and message["params"].get("blockedReason") == "csp"
        }
        requests = [
            (message["params"]["requestId"], message["params"]["request"]["url"])
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [url for id_, url in requests if url.startswith("http") and id_ not in blocked]

    def _find(self, selector: str) -> list[Any]:
        return list(self._driver.find_elements("css selector", selector))
