"""One training on several processes that torchrun started: who this process is, and what they tell each other."""

import os
import sys
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes of one training; each works on its part of every batch. One process alone is a team of one."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Tell whether this is the process that writes files and talks."""
        return self.rank == 0

    def part(self, n: int, rank: int | None = None) -> slice:
        """Return which of n things are this process's (or another's); parts differ by one at most."""
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def gather(self, values: torch.Tensor, n: int) -> torch.Tensor:
        """Join the processes' parts (see `part`) of n numbers, in order: (part,) -> (n,)."""
        if self.size == 1:
            return values
        lengths = [len(range(n)[self.part(n, rank)]) for rank in range(self.size)]
        padded = torch.zeros(max(lengths), dtype=values.dtype, device=values.device)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Join the processes' rows (on the CPU) in order of their ranks."""
        if self.size == 1:
            return rows
        parts = [rows] * self.size
        distributed.all_gather_object(parts, rows)
        return torch.cat(parts)

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Give every process the main process's running statistics, which each one updates from its own images."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def leave(self) -> None:
        """End this process of several, as the last thing that it does, when the others have come so far too.

        Python does not clear up: gloo's threads may still hold tensors then, and one process in eight aborts. Nor is
        gloo's group destroyed: with torch 2.6 that may wait for ever.
        """
        if self.size > 1:
            distributed.barrier()
            if distributed.get_backend() == "nccl":
                distributed.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def agree(self, value: T) -> T:
        """Return what the main process has (plain types)."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]


ALONE = Team()


def local_rank() -> int | None:
    """Return this process's number on its machine, None where torchrun did not start several."""
    return int(os.environ["LOCAL_RANK"]) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None


def local_size() -> int:
    """Return how many processes torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def join_team(device: torch.device) -> Team:
    """Join the processes that torchrun started: over NCCL on GPUs, over gloo on CPUs; alone without torchrun."""
    if local_rank() is None:
        return ALONE
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(distributed.get_rank(), distributed.get_world_size())
