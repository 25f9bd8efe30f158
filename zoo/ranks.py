"""Several processes of one run: who this one is, and how they hand each other what they have gathered."""

import atexit
import os
import sys
from datetime import timedelta
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.errors import ZooError

if TYPE_CHECKING:  # imported on use: the command line asks for its rank before torch is loaded
    import torch

PATIENCE = timedelta(days=7)  # that a process waits for another one, which may have far more to do
_MISSING = object()


class _Hole(NamedTuple):
    """Where a tensor was taken out of a structure."""

    shape: list[int]
    dtype: "torch.dtype"


def launched() -> tuple[int, int, int]:
    """Rank, number of processes, and of these on this machine, as torchrun, srun or Lightning's launcher set them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return int(env["RANK"]), world, int(env.get("LOCAL_WORLD_SIZE", world))
    if "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world = int(env.get("SLURM_NTASKS", 1))
        if world > 1 and "SLURM_NTASKS_PER_NODE" not in env:
            raise ZooError(f"Ask SLURM for --ntasks-per-node instead of --ntasks={world}, and start zoo with srun.")
        return int(env["SLURM_PROCID"]), world, int(env.get("SLURM_NTASKS_PER_NODE", world))
    return int(env.get("LOCAL_RANK", 0)), 1, 1  # Lightning's own launcher: it knows how many there are


def connect() -> tuple[int, int]:
    """Join the processes that were launched together, over gloo; rank and number of processes."""
    import torch.distributed as dist

    rank, world, _ = launched()
    if world > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:  # srun sets none
            from lightning.pytorch.plugins.environments import SLURMEnvironment

            cluster = SLURMEnvironment(auto_requeue=False)
            os.environ |= {"MASTER_ADDR": cluster.main_address, "MASTER_PORT": str(cluster.main_port)}
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=PATIENCE)
    return rank_and_world()


@atexit.register
def leave() -> None:
    """Leave the processes that were joined, whoever joined them: gloo aborts a process that ends without it."""
    dist = sys.modules.get("torch.distributed")  # never imported here: nothing was joined then
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) outside of a distributed run."""
    import torch.distributed as dist

    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def gather(value: Any) -> list[Any]:
    """A small value of every process, in order of rank, on every process."""
    import torch.distributed as dist

    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def gather_list(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order in which the data set was dealt out to them."""
    dealt = chain.from_iterable(zip_longest(*gather(items), fillvalue=_MISSING))
    return [item for item in dealt if item is not _MISSING]


def send(state: Any, to: int) -> None:
    """Send nested dicts, lists and tuples of tensors and plain values; tensors go one by one, none is copied."""
    import torch
    import torch.distributed as dist
    from lightning_utilities.core.apply_func import apply_to_collection

    tensors: list[torch.Tensor] = []

    def take(tensor: torch.Tensor) -> _Hole:
        tensors.append(tensor)
        return _Hole(list(tensor.shape), tensor.dtype)

    skeleton = apply_to_collection(state, torch.Tensor, take)
    dist.send_object_list([skeleton], to)
    for tensor in tensors:
        if tensor.numel():
            dist.send(tensor.contiguous(), to)


def receive(source: int, device: "torch.device") -> Any:
    """What `send` sent, its tensors on this device."""
    import torch
    import torch.distributed as dist
    from lightning_utilities.core.apply_func import apply_to_collection

    def fill(hole: _Hole) -> torch.Tensor:
        tensor = torch.empty(hole.shape, dtype=hole.dtype, device=device)
        if tensor.numel():
            dist.recv(tensor, source)
        return tensor

    box = [None]
    dist.recv_object_list(box, source)
    return apply_to_collection(box[0], _Hole, fill)
