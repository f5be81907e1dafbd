"""Shared by all tests: threads, a headless backend, and real rows to train on."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: workers with two threads each would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the kernels that run the notebooks, too
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import matplotlib
import pytest
import torch

os.environ.setdefault("SAEUTILS_SCALE", "smoke")  # read by the kernels that run the notebooks
matplotlib.use("Agg")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


FIRST = ("analysis/test_features.py", "repository", "notebook")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that converts Gemma first, then those that need no LM: the other worker has work for that minute."""

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, part in enumerate(FIRST) if f"/tests/{part}" in path), len(FIRST))

    items.sort(key=place)  # stable


@pytest.fixture(scope="session", autouse=True)
def on_cpu() -> Iterator[None]:
    """Tests compare with CPU arithmetic; what wants a GPU asks for it by name."""
    if not torch.cuda.is_available():
        yield
        return
    from saeutils.lm import models

    with patch.object(models, "default_device", lambda: "cpu"):
        yield


@pytest.fixture(scope="session")
def rows() -> torch.Tensor:
    """Real activations [n, 640]: the embedding-side residual stream of Gemma-3-270m on Wikipedia, centred, norm √d."""
    from saeutils.lm import activations, text

    acts = activations.collect(
        "gemma-3-270m", "blocks.0.hook_resid_post", text.load_text("wikipedia-summaries", max_docs=400), n_tokens=20_000
    )
    x = acts.sample(16_000, "train")["x"]
    return (x - acts.mean) * acts.scale()


@pytest.fixture(scope="session")
def searched() -> Callable[[bool], AbstractContextManager]:
    """``searched(bounded)``: SAEs are sparse at any density; bounded: and at any size where bfloat16 is quick, search."""
    from saeutils.kernels import search, sparse

    @contextmanager
    def block(bounded: bool) -> Iterator[None]:
        narrow, small = (0, 0) if bounded else (search.NARROW, search.SMALL)
        with patch.object(sparse, "DENSE_ABOVE", 2.0), patch.multiple(search, NARROW=narrow, SMALL=small):
            yield

    return block
