"""Lets the ranks of a training on one machine meet on loopback. torch itself would listen on all interfaces."""

import importlib
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed
from ray.train.torch.config import BaseWorkerGroup, TorchConfig, _TorchBackend


@dataclass
class LoopbackTorchConfig(TorchConfig):
    """Ray Train's settings of torch.distributed, with a store that only this machine reaches."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(  # type: ignore[override]  # as in Ray itself
        self, worker_group: BaseWorkerGroup, backend_config: TorchConfig
    ) -> None:
        worker_group.execute(_meet_on_loopback)
        super().on_start(worker_group, backend_config)


def _meet_on_loopback() -> None:
    """In a rank: replaces the function of torch that makes the store. It has no setting for the address."""
    # torch.distributed.rendezvous is a function with the name of its module
    importlib.import_module("torch.distributed.rendezvous")._create_c10d_store = _create_store  # type: ignore[attr-defined]


def _create_store(
    hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> torch.distributed.TCPStore:
    """A store like torch's own, except that rank 0 listens on `hostname` only."""
    listener = socket.create_server((hostname, port)).detach() if rank == 0 else None
    return torch.distributed.TCPStore(
        hostname,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listener,
        use_libuv=use_libuv,
    )
