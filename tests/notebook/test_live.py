"""One worker a panel: the newest request wins, old ones stop between steps, errors and interrupts end in a sentence."""

import threading
import time

import ipywidgets as w
import pytest
from jupyter_client.manager import start_new_kernel

from saeutils.notebook.widgets import live


@pytest.fixture
def worker():
    return live.Worker({"text": [w.HTML()], "card": [w.HTML()]})


def _grey(worker, pane="text") -> bool:
    return "saeutils-old" in worker.panes[pane][0]._dom_classes


def test_the_newest_request_wins_and_waits_for_no_old_one(worker):
    done, steps = [], []

    def slow(name):
        def job(turn):
            for _ in range(100):
                turn.check()
                steps.append(name)
                time.sleep(0.01)
            done.append(name)

        return job

    for name in range(5):
        worker.ask("text", slow(name))
        time.sleep(0.03)
    worker.ask("text", lambda turn: done.append("last"))
    began = time.monotonic()
    worker.wait(5)
    assert done == ["last"] and time.monotonic() - began < 0.3 and set(steps) == set(range(5))
    assert not _grey(worker)


def test_sliders_are_debounced_and_clicks_are_not(worker):
    done = []
    for i in range(20):
        worker.ask("text", lambda turn, i=i: done.append((i, time.monotonic())), wait=0.2)
        time.sleep(0.01)
    moved = time.monotonic()
    assert _grey(worker) and not done  # greyed at once, worked out after the last movement
    worker.ask("card", lambda turn: done.append(("click", time.monotonic())))
    worker.wait(5)
    (click, at), (last, later) = done
    assert (click, last) == ("click", 19) and at - moved < 0.1 and 0.15 < later - moved < 0.6


def test_another_pane_goes_first_and_the_interrupted_one_starts_again(worker):
    order = []

    def text(turn):
        order.append("begun")
        for _ in range(30):
            turn.check()
            time.sleep(0.01)
        order.append("written")

    worker.ask("text", text)
    time.sleep(0.05)
    worker.ask("card", lambda turn: order.append("card"))
    worker.wait(5)
    assert order == ["begun", "card", "begun", "written"] and not _grey(worker)


def test_stop_leaves_what_is_shown_grey_and_the_panel_usable(worker):
    begun, done = threading.Event(), []

    def endless(turn):
        begun.set()
        while True:
            turn.check()
            time.sleep(0.01)

    worker.ask("text", endless)
    begun.wait(5)
    live.stop_all()
    worker.wait(1)
    assert _grey(worker) and "stopped" in worker.status.value
    worker.ask("text", lambda turn: done.append(1))
    worker.wait(5)
    assert done and not _grey(worker)


@pytest.mark.parametrize("error, said", [(ValueError("write <a> prompt\nand more"), "write &lt;a&gt; prompt"), (KeyError(), "KeyError")])
def test_an_error_is_a_sentence_and_the_next_request_works(worker, error, said):
    def fail(turn):
        raise error

    worker.ask("text", fail)
    worker.wait(5)
    assert said in worker.status.value and _grey(worker) and "and more" not in worker.status.value
    worker.ask("text", lambda turn: None)
    worker.wait(5)
    assert not _grey(worker) and said not in worker.status.value


def test_many_threads_ask_at_once_and_only_the_last_is_shown(worker):
    shown = []
    for _ in range(20):
        asking = [threading.Thread(target=worker.ask, args=("text", lambda turn, i=i: shown.append(i))) for i in range(8)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        worker.ask("text", lambda turn: shown.append("last"))
        worker.wait(5)
        assert shown[-1] == "last"
    with pytest.raises(TimeoutError, match="still at work"):
        worker.ask("text", lambda turn: time.sleep(0.2))
        worker.wait(0.01)


def test_a_panel_is_shown_before_its_first_state_is_worked_out(monkeypatch):
    seen = []
    monkeypatch.setattr(live, "display", lambda shown, **_: seen.append(getattr(shown, "data", "panel")))
    pane = w.HTML()
    live.show(live.Worker({"text": [pane]}), pane, lambda turn: seen.append(turn.check() or "worked"), lambda: "static")
    assert seen == ["panel", "worked", "static"]


STEERED = """
import threading, time, torch
import ipywidgets as w
from saeutils import steering
from saeutils.lm import models
from saeutils.notebook.widgets import live
lm = models.load_lm("bilingual-lm/step-0004000")
ids = lm.to_tokens("The girl went to")
worker = live.Worker({"text": [w.HTML()]})
made = []
live.show(worker, w.HTML("panel"), lambda turn: turn.check(), lambda: "<b>static</b>")
def write(turn):
    steps = steering.stepwise(lm, ids)
    while True:
        turn.check()
        with steering.edited(lm, [steering.add("blocks.2.hook_resid_post", torch.ones(lm.cfg.d_model))]):
            made.append(next(steps))
"""
AFTER = """
worker.wait(1)
assert made and not any(point._forward_hooks for point in lm.hook_dict.values())
print(worker.status.value)
"""


@pytest.mark.parametrize("inside", [False, True], ids=["between cells", "in a cell"])
def test_an_interrupt_of_the_kernel_stops_the_worker(inside):
    manager, client = start_new_kernel()

    def ran(code: str, fine: bool = True) -> str:
        out = []
        reply = client.execute_interactive(code, timeout=120, output_hook=lambda m: out.append(str(m["content"])))
        assert (reply["content"]["status"] == "ok") == fine, "".join(out)
        return "".join(out)

    try:
        assert "<b>static</b>" in ran(STEERED)
        ran("worker.ask('text', write); time.sleep(.5); assert len(made) > 1")
        if inside:
            threading.Timer(1.0, manager.interrupt_kernel).start()
            assert "KeyboardInterrupt" in ran("time.sleep(60)", fine=False)
        else:
            manager.interrupt_kernel()
            time.sleep(0.5)
        assert "stopped" in ran(AFTER)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
