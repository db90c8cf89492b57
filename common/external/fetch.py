"""One file from a web server: politely, with retries, and whole or not at all."""

import contextlib
import email.utils
import http.client
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from common.artifacts.files import writing
from common.artifacts.versions import ROOT, commit
from common.data.sources import BadImage, looks_cut_short, read_side

TRIES = 5
FIRST_WAIT = 1.0  # seconds before the second try; each next wait is twice as long
SECONDS_WITHOUT_DATA = 30
SECONDS_FOR_A_FILE = 600
LONGEST_WAIT = 600  # seconds that a server may ask for in Retry-After
MAX_BYTES = 2**26  # of an image: a hundred times the largest seen
BLOCK = 2**16
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers after which another try may succeed
NETWORK = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)
AGENT = f"protein-localisation-pipeline/{(commit(ROOT) or 'unknown')[:7]} (Python urllib)"


class Unavailable(Exception):
    """A file that the server does not have, or that is no usable image."""


class Unreachable(Unavailable):
    """A server that did not answer, or broke its answers off, at every try."""


class Passing(Exception):
    """A try that failed and may succeed later; `after` : seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0) -> None:
        super().__init__(reason)
        self.after = after


class Pace:
    """Spaces the requests of all threads: at most `rate` a second, none while the server asks to wait."""

    def __init__(self, rate: float) -> None:
        self.interval = 1 / rate
        self.next = 0.0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def wait(self) -> None:
        """Wait for this thread's turn; raises Unreachable once `stopped` is set."""
        with self.lock:
            turn = self.next = max(time.monotonic(), self.next + self.interval)
        self.pause(turn - time.monotonic())

    def pause(self, seconds: float) -> None:
        if self.stopped.wait(max(0.0, seconds)):
            raise Unreachable("stopped")

    def hold(self, seconds: float) -> None:
        """Let no request start for some seconds."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


class Fetcher:
    """Downloads images; one for all threads. rate : requests a second."""

    def __init__(self, rate: float) -> None:
        self.pace = Pace(rate)

    def stop(self) -> None:
        """End all downloads within a block of data."""
        self.pace.stopped.set()

    def fetch(self, url: str, path: Path) -> None:
        """Download one image to `path`. Raises Unavailable, or Unreachable after TRIES tries."""
        for attempt in range(1, TRIES + 1):
            self.pace.wait()
            try:
                with writing(path) as temporary:
                    self.receive(url, temporary)
                return
            except Passing as error:
                if error.after:
                    self.pace.hold(error.after)
                if attempt == TRIES:
                    raise Unreachable(f"{error}, at each of {TRIES} tries") from None
                self.pace.pause(FIRST_WAIT * 2 ** (attempt - 1))

    def receive(self, url: str, path: Path) -> None:
        """Make one request and write its answer; raises Passing or Unavailable."""
        request = urllib.request.Request(url, headers={"User-Agent": AGENT, "Accept": "image/jpeg"})
        with translated(), urllib.request.urlopen(request, timeout=SECONDS_WITHOUT_DATA) as answer:
            expected = answer.headers.get("Content-Length", "")
            received = self.copy(answer, path)
        if expected.isdecimal() and received < int(expected):
            raise Passing(f"the connection broke after {received} of {expected} bytes")
        check_image(path)

    def copy(self, answer: http.client.HTTPResponse, path: Path) -> int:
        """Write an answer to a file; return the number of its bytes."""
        received, started = 0, time.monotonic()
        with open(path, "wb") as file:
            while block := answer.read(BLOCK):
                received += file.write(block)
                self.pace.pause(0)
                if received > MAX_BYTES:
                    raise Unavailable(f"has more than {MAX_BYTES / 1e6:.0f} MB")
                if time.monotonic() - started > SECONDS_FOR_A_FILE:
                    raise Passing(f"took more than {SECONDS_FOR_A_FILE} s")
        return received


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn the errors of a request into Passing and Unavailable; errors of writing a file stay."""
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            reason = f"{error.code} {error.reason}"
            if error.code in PASSING:
                raise Passing(reason, seconds_to_wait(error.headers.get("Retry-After"))) from None
        raise Unavailable(reason) from None
    except NETWORK as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise Passing(reason) from None


def seconds_to_wait(header: str | None) -> float:
    """Return the seconds that a Retry-After asks for, as a number or a date, at most LONGEST_WAIT."""
    header = (header or "").strip()
    if header.isascii() and header.isdecimal():
        return min(float(header), LONGEST_WAIT)
    try:
        until = email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0
    return min(max(0.0, until - time.time()), LONGEST_WAIT)


def check_image(path: Path) -> None:
    """Refuse what is not a whole image of one channel; raises Passing where another try may help, or Unavailable."""
    try:
        read_side(path, rgb_coded=True)
    except BadImage as error:
        raise Unavailable(f"the answer {error}") from None
    if looks_cut_short(path):
        raise Passing("the image's end is missing")
