"""Several processes as one training; with `parallel`, the only user of torch.distributed.

Started by torchrun, every process (rank) trains on its own batches and averages the gradients with
the others'. Without torchrun there is one rank, and all of this does nothing.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.nn.functional import all_gather as all_gather_with_gradient
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among all that train together.

    rank, size    of this process, and how many there are
    device        that it computes on
    saving_group  talks beside the training, for what is saved meanwhile
    waiting_group waits for what one rank alone does, however long it takes
    """

    rank: int
    size: int
    device: torch.device
    saving_group: distributed.ProcessGroup | None = None
    waiting_group: distributed.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Move a module to the device; with several ranks, let its gradients be averaged."""
        module = module.to(self.device)
        if self.size == 1:
            return module
        with warnings.catch_warnings():
            # Its new name is unknown to the older versions that we run on.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # Queue and momentum twin are equal on all ranks because what moves them is.
            return DistributedDataParallel(module, broadcast_buffers=False)

    @contextlib.contextmanager
    def averaging(self, module: nn.Module, is_wanted: bool) -> Iterator[None]:
        """Average the gradients of what happens within, or leave them to a later batch."""
        if isinstance(module, DistributedDataParallel) and not is_wanted:
            with module.no_sync():
                yield
        else:
            yield

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows (B, ...) of all ranks, in their order, without their gradients."""
        rows = rows.detach()
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """Return the rows (B, ...) of all ranks, in their order; gradients flow back to each."""
        if self.size == 1:
            return rows
        return torch.cat(all_gather_with_gradient(rows.contiguous()))  # type: ignore[no-untyped-call]

    def from_first(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor, of the same shape on all."""
        sent = tensor.to(self.device, copy=True)
        if self.size > 1:
            distributed.broadcast(sent, 0)
        return sent

    def mean(self, measures: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each measure over all ranks, which name the same ones."""
        if self.size == 1:
            return dict(measures)
        total = torch.tensor(list(measures.values()), dtype=torch.float64)
        distributed.all_reduce(total)
        return dict(zip(measures, (total / self.size).tolist(), strict=True))

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        values = torch.tensor(numbers)
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
        found: list[int] = values.tolist()
        return found

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            distributed.barrier(self.waiting_group)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: of one that is split, its part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be split; all ranks ask together."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


_groups: list[tuple[distributed.ProcessGroup, distributed.ProcessGroup]] = []
"""For saving and for waiting, of the processes that have joined."""


def world() -> World:
    """Return this process's place; alone unless `joined` says otherwise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if distributed.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        return World(distributed.get_rank(), distributed.get_world_size(), device, *_groups[-1])
    return World(0, 1, device)


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started, if it did; leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield world()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # torchrun keeps its store over a restart, where gloo would find the addresses of the dead.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"attempt_{attempt}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    waiting_group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    _groups.append((distributed.new_group(backend="gloo"), waiting_group))
    try:
        yield world()
    finally:
        _groups.pop()
        distributed.destroy_process_group()
