"""Threads that steer one model: each gets what it would get alone, and a plain call gets the plain model."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from saeutils import steering
from saeutils.lm import models

HOOK = "blocks.2.hook_resid_post"
PROMPTS = ["The girl went to", "He said that the"]


@pytest.fixture(scope="module")
def small():
    return models.load_lm("bilingual-lm/step-0004000")


def _push(lm, seed: int, size: float = 20.0) -> tuple:
    return steering.add(HOOK, size * torch.randn(lm.cfg.d_model, generator=torch.Generator().manual_seed(seed)))


def test_many_threads_get_what_each_gets_alone(small):
    def written(seed: int):
        edits = [_push(small, seed)] if seed else []
        return steering.generate(small, PROMPTS, edits, tokens=6, temperature=0.9 * (seed % 2), samples=2, seed=seed)

    alone = [written(seed) for seed in range(6)]
    assert len({str(texts) for texts in alone}) == 6
    ids, stop = small.to_tokens(PROMPTS[0]), threading.Event()
    with torch.no_grad():
        plain = small(ids)

    def watch() -> int:
        calls = 0
        with torch.no_grad():
            while not stop.is_set():
                assert torch.equal(small(ids), plain), f"call {calls} was edited by another thread"
                calls += 1
        return calls

    with ThreadPoolExecutor(8) as pool:
        watching = [pool.submit(watch) for _ in range(2)]
        try:
            together = list(pool.map(written, list(range(6)) * 5))
        finally:
            stop.set()
    assert together == alone * 5
    assert all(w.result() > 5 for w in watching)
    assert not any(hooks_of(small))


def hooks_of(lm) -> list:
    return [point._forward_hooks for point in lm.hook_dict.values() if point._forward_hooks]


def test_edits_nest_in_one_thread_and_end_with_it(small):
    ids = small.to_tokens(PROMPTS[0])
    with torch.no_grad():
        plain = small(ids)
        with steering.edited(small, [_push(small, 1)]):
            one = small(ids)
            with steering.edited(small, [_push(small, 2)]):
                assert not torch.equal(small(ids), one)
            assert torch.equal(small(ids), one)
        assert torch.equal(small(ids), plain) and not torch.equal(one, plain)


def test_a_model_that_is_edited_is_waited_for(small):
    began, ended = threading.Event(), []

    def hold() -> None:
        with steering.edited(small, [_push(small, 1)]):
            began.set()
            time.sleep(0.3)
            ended.append("held")

    thread = threading.Thread(target=hold)
    thread.start()
    began.wait()
    with steering.edited(small, []):
        ended.append("waited")
    thread.join()
    assert ended == ["held", "waited"]


SETUP = """
import torch
from saeutils import steering
from saeutils.lm import models
lm = models.load_lm("bilingual-lm/step-0004000")
def written(seed):
    v = torch.randn(lm.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return steering.generate(lm, ["The girl went to"], [steering.add("blocks.2.hook_resid_post", 20 * v)], tokens=12)
alone = {seed: written(seed) for seed in (1, 2)}
"""


def test_subshells_of_the_kernel_get_what_each_gets_alone():
    manager, client = start_new_kernel()
    try:
        assert client.execute_interactive(SETUP, timeout=120, output_hook=print)["content"]["status"] == "ok"
        client.control_channel.send(client.session.msg("create_subshell_request"))
        subshell = client.get_control_msg(timeout=20)["content"]["subshell_id"]
        asked = {}
        for seed in (1, 2):  # 1 in the main thread, 2 in the subshell's
            code = f"import threading\nassert all(written({seed}) == alone[{seed}] for _ in range(8))\nthreading.get_ident()"
            message = client.session.msg("execute_request", {"code": code, "user_expressions": {"me": "threading.get_ident()"}})
            if seed == 2:
                message["header"]["subshell_id"] = subshell
            client.shell_channel.send(message)
            asked[message["header"]["msg_id"]] = seed
        threads = set()
        for _ in asked:
            content = client.get_shell_msg(timeout=120)["content"]
            assert content["status"] == "ok", content.get("traceback")
            threads.add(content["user_expressions"]["me"]["data"]["text/plain"])
        assert len(threads) == 2
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
