"""Several processes that train one model: who does what, and what they tell each other. No pickle.

torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) says which one this is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training.

    Attributes:
        rank: from 0; the first one alone writes.
        device: where what is exchanged must lie.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own(self, folder: Path) -> Path:
        """Where this process writes: the training's folder, or one beside it that nobody reads."""
        return folder if self.is_first else folder / f".rank-{self.rank}"

    def share(self, passes: Sequence[T]) -> list[tuple[T, bool]]:
        """Every n-th of the passes, and whether it is for its own sake: all processes take equally many.

        Weights are gathered in each pass, which all processes must do together; who has one less repeats
        the first pass without a gradient of its own.
        """
        mine = [(item, True) for item in passes[self.rank :: self.size]]
        missing = -(-len(passes) // self.size) - len(mine)
        return mine + [(item, False) for item in passes[:1]] * missing

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return values
        summed = values.detach().to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def gathered(self, value: Any) -> list[Any]:
        """What every process says, by rank, as JSON values."""
        if self.size == 1:
            return [value]
        said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(said)], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = int(max(lengths))
        padded = torch.nn.functional.pad(said, (0, longest - len(said))).to(self.device)
        everything = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(everything, padded)
        texts = (bytes(of[: int(n)].cpu().numpy()) for of, n in zip(everything, lengths, strict=True))
        return [json.loads(text) for text in texts]


ALONE = Ranks()


@contextmanager
def joined_ranks(on_cuda: bool) -> Iterator[Ranks]:
    """This process among those that torchrun or `echomine train --nproc` started; alone without them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield Ranks(int(os.environ["RANK"]), size, "cuda" if on_cuda else "cpu")
    finally:
        dist.destroy_process_group()
