"""One rank of one training run: FSDP2 over all ranks, sequences split over pairs of them, a checkpoint on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from xloss import CELossConfig, CELossContext, CELossContextInputItem
from xloss.cli.parallel.model import SplitLM
from xloss.cli.spawn import Rank
from xloss.cli.tiny_lm import windows
from xloss.distributed import all_reduce_sum, sp_split

NUM_MICRO_BATCHES = 2  # of each rank: all ranks go through the model equally often
IGNORE = -100


@dataclass(frozen=True)
class Job:
    """What every rank is told."""

    steps: int
    vocab_size: int
    hidden_size: int
    seed: int
    num_sequences: int = 8
    length: int = 64
    learning_rate: float = 3e-3

    @property
    def saved_at(self) -> int:
        """Steps done when the checkpoint is written."""
        return self.steps // 2


@dataclass(frozen=True)
class Curve:
    """Loss of each step of one run, nats per token. ``start``: the steps that its checkpoint had behind it."""

    processes: int
    data_ranks: int
    sequence_ranks: int
    values: tuple[float, ...]
    seconds: float
    start: int = 0
    saved_by: int = 0  # processes of the run that wrote the checkpoint


def layout(processes: int) -> tuple[int, int]:
    """Data-parallel times sequence-parallel ranks: sequences are split in two where there is an even number."""
    return (processes // 2, 2) if processes % 2 == 0 else (processes, 1)


def train_ranks(rank: Rank, job: Job, text: Tensor, own: str, other: tuple[str, int] | None) -> list[Curve]:
    """All of one number of processes: a run from the start, saved in ``own`` on the way, and runs that resume.

    ``other`` is a checkpoint of another number of processes, and that number.
    """
    torch.set_num_threads(1)  # so small a model waits for threads more than they help it
    trainer = Trainer(rank, job, text)
    curves = [trainer.run(own)]
    for folder, saved_by in [(own, rank.world), *([other] if other else [])]:
        resumed = Trainer(rank, job, text, seed=job.seed + 1)  # what it starts from must come from the checkpoint
        curves.append(resumed.resume(folder, saved_by))
    return curves


class Trainer:
    """Model, optimizer and mesh of one rank."""

    def __init__(self, rank: Rank, job: Job, text: Tensor, seed: int | None = None) -> None:
        self.rank, self.job, self.text = rank, job, text
        self.mesh = init_device_mesh(rank.device.type, layout(rank.world), mesh_dim_names=("dp", "sp"))
        self.sp_mesh: DeviceMesh | None = self.mesh["sp"] if self.mesh["sp"].size() > 1 else None
        torch.manual_seed(job.seed if seed is None else seed)  # the same weights on all ranks, then cut
        self.model = SplitLM(job.vocab_size, job.hidden_size, job.length).to(rank.device)
        everyone = init_device_mesh(rank.device.type, (rank.world,))  # sequence-parallel ranks hold distinct tokens
        for block in self.model.blocks:
            fully_shard(block, mesh=everyone)
        fully_shard(self.model, mesh=everyone)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=job.learning_rate, betas=(0.9, 0.95))

    def run(self, folder: str) -> Curve:
        """Every step, with a checkpoint in ``folder`` half way."""
        return self._train(0, folder)

    def resume(self, folder: str, saved_by: int) -> Curve:
        """The steps after the checkpoint in ``folder``, whatever number of processes wrote it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        return self._train(self.job.saved_at, None, saved_by)

    def save(self, folder: str) -> None:
        """Shards of all ranks, with what is needed to cut them otherwise."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def _train(self, start: int, folder: str | None, saved_by: int = 0) -> Curve:
        values, began = [], time.perf_counter()
        for step in range(start, self.job.steps):
            if folder is not None and step == self.job.saved_at:
                self.save(folder)
            values.append(self._step(step))
            if self.rank.rank == 0:
                self.rank.tell(f"loss {values[-1]:.2f}")
        data_ranks, sequence_ranks = self.mesh.shape
        seconds = time.perf_counter() - began
        return Curve(self.rank.world, data_ranks, sequence_ranks, tuple(values), seconds, start, saved_by)

    def _step(self, step: int) -> float:
        """One optimizer step on the global batch of ``step``; its loss."""
        ids, labels = (part.to(self.rank.device) for part in global_batch(self.text, self.job, step))
        mine = torch.arange(len(ids)).tensor_split(self.mesh["dp"].size())[self.mesh["dp"].get_local_rank()]
        micro_batches = mine.tensor_split(NUM_MICRO_BATCHES)
        config = CELossConfig()
        items = [CELossContextInputItem(shifted_labels=labels[rows]) for rows in micro_batches]
        if self.sp_mesh is not None:
            items = [item.sp_split(self.sp_mesh) for item in items]
        every_kwargs = CELossContext.build_batches_loss_kwargs(items, config, None, self.sp_mesh)
        total = torch.zeros((), device=self.rank.device)
        for i, (rows, kwargs) in enumerate(zip(micro_batches, every_kwargs, strict=True)):
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(i == NUM_MICRO_BATCHES - 1)
            loss = self._forward(ids[rows], CELossContext(config, kwargs))
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(all_reduce_sum(total)) / self.rank.world  # as FSDP averages gradients

    def _forward(self, ids: Tensor, loss_ctx: CELossContext) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        group: dist.ProcessGroup | None = None
        if self.sp_mesh is not None:
            ids, positions = (sp_split(x, self.sp_mesh, 0) for x in (ids, positions))
            group = self.sp_mesh.get_group()
        loss: Tensor = self.model(ids, positions, loss_ctx, group)
        return loss


def global_batch(text: Tensor, job: Job, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels ``[B, S]`` of one step, the same in any run: random windows, each with a prompt of its own
    length, whose labels are ignored.
    """
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 + step)
    ids = windows(text, job.num_sequences, job.length + 1, generator)
    prompts = torch.randint(1, job.length, (job.num_sequences, 1), generator=generator)
    labels = ids[:, 1:].masked_fill(torch.arange(job.length) < prompts, IGNORE)
    return ids[:, :-1].contiguous(), labels


def checkpoint_folder(folder: Path, processes: int) -> str:
    """Where the run of so many processes saves."""
    return str(folder / f"checkpoint-{processes}")
