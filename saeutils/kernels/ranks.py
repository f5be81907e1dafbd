"""Several processes that train one SAE on parts of each batch (torch.distributed, started by torchrun); alone all of this does nothing."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class Broken(RuntimeError):
    """An exchange with the others failed: one of them is gone."""


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's own are of several kinds
        raise Broken(str(error)) from error


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if world() > 1 else 0


def part(batch: Tensor) -> Tensor:
    """This process's rows of a batch that all have read."""
    size = len(batch) // world()
    return batch[rank() * size : (rank() + 1) * size]


def mean(x: Tensor) -> Tensor:
    """Mean over all processes, detached; they must call it together."""
    return total(x) / world()


def total(x: Tensor) -> Tensor:
    """Sum over all processes, detached."""
    x = x.detach()
    if world() > 1:
        x = x.clone()
        with _exchange():
            dist.all_reduce(x)
    return x


def of_first(x: Tensor) -> Tensor:
    """Process 0's ``x``: what all have computed may differ in its last bits on processors of several kinds."""
    if world() == 1:
        return x
    shared = x.to(_device())  # NCCL knows of nothing in host memory
    with _exchange():
        dist.broadcast(shared, 0)
    return shared.to(x.device)


def least(x: float) -> float:
    """The smallest over all processes."""
    if world() == 1:
        return x
    found = torch.tensor(x, dtype=torch.double, device=_device())
    with _exchange():
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)


def largest(values: Tensor, k: int) -> Tensor:
    """Which of ``values`` [n] are among the ``k`` largest of all processes', as positions in order; of equal ones at the edge all."""
    if world() == 1:
        return values.topk(min(k, len(values)), sorted=False).indices.sort().values
    own = values.topk(min(k, len(values)), sorted=False).values
    sizes = [own.new_zeros((), dtype=torch.long) for _ in range(world())]
    with _exchange():
        dist.all_gather(sizes, own.new_tensor(len(own), dtype=torch.long))
        padded = own.new_full((max(1, int(max(sizes))),), -torch.inf)
        padded[: len(own)] = own
        everyone = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(everyone, padded)
    both = torch.cat(everyone)
    if k >= int(sum(sizes)):
        return torch.arange(len(values), device=values.device)
    return (values >= both.topk(k).values[-1]).nonzero()[:, 0]


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Gradients become their means over all processes, in place."""
    if world() == 1:
        return
    for p in parameters:
        if p.grad is not None:  # a transposed one lies whole in memory as its transpose
            grad = p.grad if p.grad.is_contiguous() else p.grad.T
            with _exchange():
                dist.all_reduce(grad)
            grad.div_(world())


def meet() -> None:
    """Wait for all processes."""
    if world() > 1:
        with _exchange():
            dist.barrier()


def require_alike(what: dict[str, object]) -> None:
    """All processes came with the same.

    Raises:
        ValueError: they did not; what differs.
    """
    if world() == 1:
        return
    everyone: list = [None] * world()
    with _exchange():
        dist.all_gather_object(everyone, what)
    if differs := sorted(name for name in what if any(other.get(name) != what[name] for other in everyone)):
        raise ValueError(f"the {world()} processes differ in {', '.join(differs)}: give all the same, and one folder of checkpoints that all see")


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
