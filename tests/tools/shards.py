"""Ranks that run different layers and numbers of groups, wrapped by DDP and by FSDP2; called on both of two ranks.

Fails if a gradient is not the mean of those that single processes get.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from builders import batch, dynamic_model, random_plan
from dht.policy.baselines import FixedPlan

FAMILY = "mpnet"


def job(of: int) -> tuple[dict[str, torch.Tensor], FixedPlan]:
    """Rank 0 runs all layers with many head sets; no row of rank 1 goes beyond layer 1."""
    plan = random_plan(7, seed=of)
    plan.units[:, of or 3 :] = False
    if of:
        plan.units[:] = plan.units[:1]
    return batch(seed=of), FixedPlan(plan)


def loss_of(model: torch.nn.Module, of: int) -> torch.Tensor:
    inputs, policy = job(of)
    return model(**inputs, policy=policy).loss


def expected() -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for of in range(2):
        model = dynamic_model(FAMILY)
        loss_of(model, of).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad / 2
    return total


def check(model: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    seen = 0
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        if name not in wanted:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert torch.allclose(grad, wanted[name], atol=1e-6, rtol=1e-5), name
        seen += bool(grad.any())
    assert seen > 30, seen


def run_different_layers() -> None:
    rank, wanted = dist.get_rank(), expected()
    replicated = DistributedDataParallel(dynamic_model(FAMILY), find_unused_parameters=True)
    sharded = dynamic_model(FAMILY)
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.encoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert sharded.encoder.blocks[0].qkv_weight.to_local().shape[0] < 5
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
            for model in (replicated.module, sharded):
                model.train()._set_gradient_checkpointing(True, gradient_checkpointing_func=checkpoint)
            for module in (*replicated.modules(), *sharded.modules()):
                if hasattr(module, "attention_dropout"):
                    module.dropout = module.attention_dropout = 0.0
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        for model in (replicated, sharded):
            for _ in range(2):  # a second step finds nothing left over of the first
                model.zero_grad()
                loss_of(model, rank).backward()
                check(model, wanted)
    with torch.no_grad():
        sharded.eval()
        inputs, policy = job(rank)
        trace = sharded(**inputs, policy=policy).trace
        assert trace.layers.tolist() == policy.plan.layers.tolist()
        print(f"rank {rank} ran {int(trace.layers.max())} layers")
