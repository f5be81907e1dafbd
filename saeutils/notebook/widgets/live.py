"""What every panel shares: one worker, of which the newest request wins; old results greyed; errors in one sentence."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Sequence
from weakref import WeakSet

import ipywidgets as w
import torch
from IPython import get_ipython
from IPython.display import HTML, display

DEBOUNCE = 0.3  # seconds that sliders and typing wait for the next movement; clicks do not wait
STYLE = "<style>.saeutils-old {opacity: .4} .widget-html-content {line-height: 1.35 !important}</style>"
_WORKERS: WeakSet = WeakSet()


class Cancelled(Exception):
    """The request was replaced or stopped: what it shows is old."""


class Turn:
    """One request. Its job calls :meth:`check` wherever it can stop, between two tokens for instance."""

    def __init__(self, job: Callable[[Turn], None], due: float):
        self.job, self.due, self.cancelled, self.again = job, due, threading.Event(), False

    def check(self) -> None:
        """Raises:
        Cancelled: a newer request is waiting, or the work was stopped.
        """
        if self.cancelled.is_set():
            raise Cancelled


class Worker:
    """Requests by pane: a newer one of the same pane replaces the old, one of another pane goes first and the old starts again.

    ``panes``: what each pane shows, greyed from the request on until its job is done. ``status`` says what is going on.
    """

    def __init__(self, panes: dict[str, Sequence[w.DOMWidget]]):
        self.panes, self.status = panes, w.HTML(layout=w.Layout(height="24px"))
        self._changed, self._waiting, self._running, self._thread = threading.Condition(), {}, None, None
        self._first: Callable[[], None] | None = None  # what the first request after showing does
        _WORKERS.add(self)

    def ask(self, pane: str, job: Callable[[Turn], None], wait: float = 0.0) -> None:
        """Run ``job(turn)`` in the worker's thread, ``wait`` seconds from now unless a newer request of the pane comes."""
        if self._first:
            self._first()
        for shown in self.panes[pane]:
            shown.add_class("saeutils-old")
        self.say("…")
        with self._changed:
            self._waiting[pane] = Turn(job, time.monotonic() + wait)
            if self._running:
                name, turn = self._running
                turn.again = name != pane and (turn.again or not turn.cancelled.is_set())
                turn.cancelled.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self, *_) -> None:
        """Cancel what runs and what waits, before the next token; what is shown stays grey."""
        with self._changed:
            busy = bool(self._waiting or self._running)
            self._waiting.clear()
            if self._running:
                self._running[1].again = False
                self._running[1].cancelled.set()
            self._changed.notify_all()
        if busy:
            self.say("stopped")

    def wait(self, timeout: float = 120.0) -> None:
        """Until nothing is asked for.

        Raises:
            TimeoutError: not within ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout):
                raise TimeoutError(f"the panel is still at work after {timeout:g} seconds")

    def board(self, left: w.Widget, right: w.Widget) -> w.Widget:
        """Status above, then both side by side, or below each other where there is no room."""
        return w.VBox([self.status, w.HBox([left, right], layout=w.Layout(flex_flow="row wrap"))])

    def say(self, text: str, wrong: bool = False) -> None:
        """One line of status; the text is escaped."""
        self.status.value = f"<span style='color:{'#b00020' if wrong else '#666'}'>{html.escape(text)}</span>"

    def _next(self) -> tuple[str, Turn] | None:
        """The request whose time has come first, or None when there is none left (and the thread ends)."""
        with self._changed:
            while self._waiting:
                pane = min(self._waiting, key=lambda p: self._waiting[p].due)
                left = self._waiting[pane].due - time.monotonic()
                if left <= 0:
                    self._running = pane, self._waiting.pop(pane)
                    return self._running
                self._changed.wait(left)
            self._thread = None
            self._changed.notify_all()
            return None

    def _work(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a new thread has no CUDA context until its first call, and cuBLAS warns if that call is its own
        while found := self._next():
            pane, turn = found
            try:
                turn.check()
                self.say("")
                turn.job(turn)
                for shown in self.panes[pane]:
                    shown.remove_class("saeutils-old")
            except Cancelled:
                pass
            except Exception as error:  # a callback's error would be lost in a log, and the panel say "…" for ever
                self.say(str(error).splitlines()[0] if str(error) else type(error).__name__, wrong=True)
            with self._changed:
                self._running = None
                if turn.again and pane not in self._waiting:
                    self._waiting[pane] = Turn(turn.job, time.monotonic())


def show(worker: Worker, panel: w.Widget, first: Callable[[Turn], None], static: Callable[[], str]) -> None:
    """Display a panel (with its worker's status in it), and only then work out its first state, so that nobody waits before nothing.

    Below it stands, until someone uses it, what ``static`` says of that state: for readers without a kernel.
    """
    _hear_interrupts()
    display(w.VBox([w.HTML(STYLE, layout=w.Layout(height="0px", margin="0")), panel]))
    first(Turn(first, 0))
    below = display(HTML(static()), display_id=True)

    def live() -> None:
        worker._first = None
        if below is not None:
            below.update(HTML(""))

    worker._first = live


def stop_all(*_) -> None:
    """Stop the workers of all panels, before their next token."""
    for worker in list(_WORKERS):
        worker.stop()


def _after_cell(result) -> None:
    if isinstance(result.error_in_exec, KeyboardInterrupt):
        stop_all()


def _hear_interrupts() -> None:
    """An interrupt of the kernel reaches the main thread alone, and none at all between cells: hand it on to the workers."""
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return
    if _after_cell not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", _after_cell)
    if hasattr(shell.kernel, "saved_sigint_handler") and threading.current_thread() is threading.main_thread():
        shell.kernel.saved_sigint_handler = stop_all  # what the kernel sets once this cell is done
