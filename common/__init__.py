"""Everything that the numbered scripts import. Whatever they import first, from here on Ctrl+C is no traceback."""

import os
import sys
from types import TracebackType

os.environ.setdefault(
    "OPENCV_IO_MAX_IMAGE_PIXELS", str(2**26)
)  # OpenCV refuses larger headers; it asks when it is loaded


def _on_exception(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Ctrl+C while a script is still importing is no bug: say what is said later on, and end as Python does.

    Nor is the end of a process at the other end of a connection, which threads of multiprocessing report here.
    """
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        if not isinstance(value, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, value, trace)
        return

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from common.process.main import say_stopped, stop_behind  # anew, where it came in the middle of that

    if stop := stop_behind(value):
        say_stopped(stop)
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    else:
        sys.__excepthook__(kind, value, trace)


sys.excepthook = _on_exception

from common.process import stopping  # noqa: E402  after the hook, for Ctrl+C may come now

stopping.spare_imports()
