"""Checkpoints of a training: state.pt for all ranks, a file per rank, and lanes.json for the driver to check."""

import json
import tempfile
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import ray.train
import torch

from jobs.training.state import TrainState
from pipeline.corpus.streams import Lanes, Position

LANES_FILE = "lanes.json"


def save_checkpoint(state: TrainState) -> None:
    """Hands a checkpoint to Ray Train. Every rank must call it. Does nothing if this step was saved already."""
    if state.step == state.saved_step:
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(_rank_state(state), Path(folder) / _rank_file(state))
        if state.rank == 0:
            torch.save(_shared_state(state), Path(folder) / "state.pt")
            (Path(folder) / LANES_FILE).write_text(json.dumps(asdict(state.data.lanes)))
        ray.train.report({"step": state.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
    state.saved_step = state.step


def load_checkpoint(state: TrainState) -> bool:
    """Restores the last checkpoint of the run. Returns False if there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return False
    with checkpoint.as_directory() as folder:
        shared = torch.load(Path(folder) / "state.pt", map_location=state.device, weights_only=True)
        ranks = {file.name: torch.load(file, weights_only=True) for file in Path(folder).glob("rank-*.pt")}
        lanes = Lanes(**json.loads((Path(folder) / LANES_FILE).read_text()))
    state.autoencoder.load_state_dict(shared["model"])
    state.trainer.optimizer.load_state_dict(shared["optimizer"])
    if state.averages is not None:
        state.averages.values = shared["averages"]
    if state.trainer.gan_loss is not None:
        state.trainer.gan_loss.load_state_dict(shared["adversary"])
    state.step = state.saved_step = shared["step"]
    state.history = shared["history"]
    positions = {lane: Position(*at) for rank in ranks.values() for lane, at in rank["positions"].items()}
    state.data.resume(lanes, positions)
    own = ranks.get(_rank_file(state))
    if own is None:  # the number of ranks has changed: every rank draws fresh noise, which no rank had before
        state.seed_noise()
        mine = list(ranks.values()) if state.rank == 0 else []
    else:
        mine = [own]
        torch.set_rng_state(own["rng"])
        if state.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"])
    state.data.num_skipped = sum(rank["num_bad"] for rank in mine)
    state.data.skipped = [sample for rank in mine for sample in rank.get("skipped", [])]  # older ones have none
    return True


def _rank_state(state: TrainState) -> dict[str, Any]:
    positions = {lane: list(astuple(at)) for lane, at in state.data.positions.items()}
    own: dict[str, Any] = {"positions": positions, "rng": torch.get_rng_state()}
    own |= {"num_bad": state.data.num_skipped, "skipped": state.data.skipped}
    if state.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state()
    return own


def _shared_state(state: TrainState) -> dict[str, Any]:
    shared: dict[str, Any] = {"step": state.step, "history": state.history}
    shared |= {"model": state.autoencoder.state_dict(), "optimizer": state.trainer.optimizer.state_dict()}
    if state.averages is not None:
        shared["averages"] = state.averages.values
    if state.trainer.gan_loss is not None:
        shared["adversary"] = state.trainer.gan_loss.state_dict()
    return shared


def _rank_file(state: TrainState) -> str:
    return f"rank-{state.rank}-of-{state.world_size}.pt"
