"""One of two processes that run blocks on PyTorch's own engine, over gloo on the CPU: DDP, FSDP2, pipelines.

``test_distributed.py`` starts both with the environment that ``torchrun`` gives, and names the cases that
failed. Every case has process groups of its own, so that none meets what another has left.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from odeblock import DeepConvResBlock, DeepResBlock
from odeblock.diagnostics import Monitor, check_assumptions
from odeblock.sharded import whole

TIMEOUT = timedelta(seconds=20)
GUIDE = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
STRATEGIES = ("auto", "store", "checkpoint", "adjoint")
STATES = {"rows": (8, 3, 4), "maps": (8, 4, 5, 3), "norm": (8, 4, 5, 3)}
DEPTH, PARTS = 7, 3  # 3, 2 and 2 steps, of which two processes have unequal shares

Batch = tuple[Tensor, Tensor]


def make(kind: str, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A block of rows, of maps, or of maps with batch normalisation; the same in both processes."""
    torch.manual_seed(1)
    options = {"activation": "silu", "dtype": dtype, **options}
    if kind == "norm":
        options["norm"] = "batch"
    else:
        options["bias"] = True
    Block = DeepResBlock if kind == "rows" else DeepConvResBlock
    block = Block(4, DEPTH, 5, **options)
    with torch.no_grad():
        for p in block.parameters():  # no bias is zero
            p += 0.1 * torch.randn_like(p)
    return block


def batches(kind: str, count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Inputs and targets of all, in ``count`` pieces."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(STATES[kind], generator=generator).to(dtype) for _ in range(2))
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def alone(kind: str, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """What one process sees; each of two normalises its own half."""
    return batches(kind, 2 if kind == "norm" else 1, dtype)


def mine(kind: str, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """The half of this process."""
    return [batches(kind, 2, dtype)[dist.get_rank()]]


def backward(model: nn.Module, pieces: Sequence[Batch]) -> None:
    """Adds the gradients of the mean loss of all pieces."""
    for x, y in pieces:
        (F.mse_loss(model(x).to(y.dtype), y) / len(pieces)).backward()


def train(model: nn.Module, pieces: Sequence[Batch], steps: int = 3) -> torch.optim.Optimizer:
    """Leaves the gradients of the last step in place."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, pieces)
        optimizer.step()
    return optimizer


def compare(found: nn.Module, expected: nn.Module, tolerance: float = 1e-11, gradients: bool = True) -> None:
    """Parameters and their gradients, relative to their largest entries."""
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        check(name, p, q, tolerance)
        if gradients:
            check(f"{name}.grad", p.grad, q.grad, tolerance)


def check(name: str, found: Any, expected: Any, tolerance: float) -> None:
    found, expected = (whole(t.detach()).double() for t in (found, expected))
    error, size = (found - expected).abs().max(), expected.abs().max()
    assert error <= tolerance * size, f"{name}: {error / size:.1e}"


# ---- DistributedDataParallel -----------------------------------------------------------------------------


def ddp(kind: str, strategy: str) -> None:
    block = make(kind, backward=strategy)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(block))
    train(block, alone(kind))
    train(model, mine(kind))
    compare(model.module, block)


def ddp_accumulates(kind: str) -> None:
    """Half a share without synchronisation, then the other half with it."""
    block = make(kind, backward="adjoint")
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(block))
    quarters = batches(kind, 4)
    backward(block, quarters)
    first, second = quarters[2 * dist.get_rank() :][:2]
    with model.no_sync():
        F.mse_loss(model(first[0]), first[1]).div(2).backward()
    F.mse_loss(model(second[0]), second[1]).div(2).backward()
    compare(model.module, block)


def ddp_in_bfloat16(kind: str) -> None:
    """Parameters and gradients of 8 bits."""
    block = make(kind, dtype=torch.bfloat16)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(block))
    backward(block, alone(kind, torch.bfloat16))
    backward(model, mine(kind, torch.bfloat16))
    compare(model.module, block, 2 * torch.finfo(torch.bfloat16).eps)


# ---- FSDP2 -----------------------------------------------------------------------------------------------


def sharded(block: Any, **options: Any) -> Any:
    """The block in parts, each of which is gathered by itself."""
    from torch.distributed.fsdp import fully_shard

    parts = block.split(PARTS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for part in parts:
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(parts, mesh=mesh, **options)


def fsdp(kind: str, strategy: str) -> None:
    block = make(kind, backward=strategy)
    parts, model = block.split(PARTS), sharded(block)
    train(parts, alone(kind))
    train(model, mine(kind))
    compare(model, parts)


def fsdp_in_bfloat16(kind: str) -> None:
    """Gathered and computed in bfloat16, reduced and kept in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    block = make(kind, dtype=torch.float32)
    parts = block.split(PARTS).bfloat16()
    model = sharded(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    backward(parts, alone(kind, torch.bfloat16))
    backward(model, mine(kind, torch.bfloat16))
    compare(model, parts, 4 * torch.finfo(torch.bfloat16).eps)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def fsdp_gathers_a_part_at_a_time() -> None:
    model = sharded(make("rows", backward="checkpoint"))
    gathered: dict[int, torch.UntypedStorage] = {}
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        seen.append([i for i, storage in gathered.items() if storage.size()])

    def remember(i: int, part: Any) -> None:
        gathered[i] = part.V.untyped_storage()  # the same in all steps
        look()

    for i, part in enumerate(model):
        part.register_forward_pre_hook(lambda part, _, i=i: remember(i, part))
        part.register_forward_hook(lambda part, _, y: y.register_hook(look) and None)
    backward(model, mine("rows"))
    seen.clear()
    backward(model, mine("rows"))
    down_and_up = [*range(PARTS), *reversed(range(PARTS))]
    assert all(i in now and len(now) <= 2 for i, now in zip(down_and_up, seen, strict=True)), seen
    look()
    assert seen[-1] == []


def fsdp_output_may_change_in_place(kind: str) -> None:
    """FSDP gathers the weights for a backward when the gradient of the output comes."""
    block = make(kind)
    model = sharded(block)
    x, y = mine(kind)[0]
    for network in (block, model):
        state = network(x)
        state += 1
        (state - y).square().sum().backward()
    for name, p in block.named_parameters():
        dist.all_reduce(p.grad)
        check(name, torch.cat([whole(getattr(part, name).grad) for part in model]), p.grad / 2, 1e-11)


def fsdp_from_meta(kind: str) -> None:
    """Drawn after sharding, the weights are those of one process with the seed of the first."""
    from torch.distributed.fsdp import fully_shard

    block = make(kind)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = fully_shard(make(kind, device="meta"), mesh=mesh).to_empty(device="cpu")
    for i, network in enumerate((block, model)):
        torch.manual_seed(3 + i * dist.get_rank())
        network.reset_parameters()
    compare(model, block, 0, gradients=False)
    x = mine(kind)[0][0]
    assert torch.equal(model(x), block(x))


def fsdp_other_methods(kind: str) -> None:
    """Sharded parameters are refused; gathered, a block is as it was."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    block = make(kind)
    model = fully_shard(copy.deepcopy(block), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    x = mine(kind)[0][0]
    uses: list[Callable[[Any], Any]] = [
        lambda b: b.resample(9)(x),
        lambda b: b.split(2)(x),
        lambda b: type(b).from_layers(b.to_layers())(x),
        lambda b: b.trajectory(x, 2),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"V: expected a whole tensor, got a shard .* \.unshard\(\)"):
            use(model)
    model.unshard()
    for use in uses:
        assert torch.equal(use(model), use(block))
    model.reshard()
    register_fsdp_forward_method(model, "trajectory")
    assert torch.equal(model.trajectory(x, 2), block.trajectory(x, 2))


def fsdp_diagnostics(kind: str) -> None:
    """Of shares they are those of the whole."""
    block = make(kind)
    (batch,) = batches(kind, 1)
    found = []
    for model in (block.split(PARTS), sharded(block)):
        backward(model, [batch])
        limit = {"0.V": torch.zeros(9, *block.V.shape[1:])}
        monitor = Monitor(model, limit=limit)
        monitor(1.0)
        found.append((monitor.history[0], list(map(str, check_assumptions(model)))))
    (expected, reasons), (seen, seen_reasons) = found
    assert seen == pytest.approx(expected, rel=1e-11)
    assert seen_reasons == reasons


# ---- pipelines -------------------------------------------------------------------------------------------


def pipeline(kind: str, schedule: str, stages_each: int) -> None:
    """Four pieces of the batch through stages that the two processes have in turn."""
    from torch.distributed import pipelining

    block = make(kind)
    count, rank = 2 * stages_each, dist.get_rank()
    parts = block.split(count)
    stages = [
        pipelining.PipelineStage(parts[i], i, count, torch.device("cpu")) for i in range(rank, count, 2)
    ]
    Schedule = getattr(pipelining, f"Schedule{schedule}")
    run = Schedule(stages if stages_each > 1 else stages[0], 4, loss_fn=F.mse_loss)
    ((x, y),) = batches(kind, 1)
    losses: list[Tensor] = []
    if rank == 0:
        run.step(x)
    else:
        run.step(target=y, losses=losses)
        with torch.no_grad():
            expected = torch.stack([F.mse_loss(copy.deepcopy(block)(x), y) for x, y in batches(kind, 4)])
        check("losses", torch.stack(losses), expected, 1e-13)
    backward(block, batches(kind, 4))
    for i in range(rank, count, 2):
        for name, p in parts[i].named_parameters():
            check(f"{i}.{name}.grad", p.grad, getattr(block, name).grad.tensor_split(count)[i], 1e-11)


# ---- checkpoints -----------------------------------------------------------------------------------------


def saved_by_two_loaded_by_one(kind: str, folder: Path) -> None:
    """Sharded and with its optimiser; then whole, in one process, where training goes on."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    block = make(kind)
    model = sharded(block)
    optimizer = train(model, mine(kind))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)

    parts = block.split(PARTS)
    again = train(parts, alone(kind), 1)  # has a state, which goes
    model_state, optimizer_state = get_state_dict(parts, again)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(parts, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    compare(parts, model, 0, gradients=False)
    for network, optim, pieces in ((model, optimizer, mine(kind)), (parts, again, alone(kind))):
        optim.zero_grad()
        backward(network, pieces)
        optim.step()
    compare(parts, model)


def saved_by_one_loaded_by_two(kind: str, folder: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    block = make(kind)
    parts = block.split(PARTS)
    train(parts, alone(kind))
    if dist.get_rank() == 0:
        checkpoint.save({"model": parts.state_dict()}, checkpoint_id=folder, no_dist=True)
    dist.barrier()
    model = sharded(block)
    state = {"model": get_model_state_dict(model)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    compare(model, parts, 0, gradients=False)
    for found, expected in zip(model.buffers(), parts.buffers(), strict=True):
        assert torch.equal(found, expected)


def a_full_state_dict(kind: str) -> None:
    """That the first process has, for all; and one of another depth."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    block, other = make(kind), make(kind, init="iid")
    model = sharded(block)
    given = other.split(PARTS).state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, given, options=options)
    compare(model, other.split(PARTS), 0, gradients=False)
    with pytest.raises(RuntimeError, match="this block has depth 3, the state dict holds one of depth 4"):
        model.load_state_dict(other.split(2).state_dict(), strict=False)


# ---- what is run -----------------------------------------------------------------------------------------


def guide() -> None:
    """The program that the documentation shows, from its own ``init_process_group`` on."""
    program = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile("\n".join(program), GUIDE.name, "exec"), found)
    block, trained, x = found["block"], found["whole"], found["x"]
    assert torch.equal(trained(x), found["parts"](x))
    assert not torch.equal(trained.V, block.V)  # but as the other engine has trained the same weights
    check("V", torch.cat([part.V for part in found["model"].module]), trained.V, 1e-5)
    F.mse_loss(block(x), found["y"]).backward()
    check("V.grad", found["part"].V.grad, block.V.grad.chunk(2)[found["rank"]], 1e-5)


def _cases() -> dict[str, Callable[..., None]]:
    cases: dict[str, Callable[..., None]] = {"guide": guide}

    def add(function: Callable[..., None], *arguments: Any) -> None:
        name = "-".join([function.__name__, *map(str, arguments)])
        cases[name] = functools.partial(function, *arguments)

    for kind in STATES:
        for strategy in STRATEGIES:
            add(ddp, kind, strategy)
            add(fsdp, kind, strategy)
        for function in (ddp_accumulates, ddp_in_bfloat16, fsdp_in_bfloat16):
            add(function, kind)
        for function in (
            fsdp_output_may_change_in_place,
            fsdp_from_meta,
            fsdp_other_methods,
            fsdp_diagnostics,
        ):
            add(function, kind)
        add(pipeline, kind, "GPipe", 1)
        add(pipeline, kind, "1F1B", 1)
        for function in (saved_by_two_loaded_by_one, saved_by_one_loaded_by_two, a_full_state_dict):
            add(function, kind)
    add(fsdp_gathers_a_part_at_a_time)
    add(pipeline, "rows", "Interleaved1F1B", 2)
    add(pipeline, "rows", "InterleavedZeroBubble", 2)
    if torch.__version__ < "2.7":  # shards on GPUs alone, and adds gradients of a pipeline up, not their mean
        return {name: case for name, case in cases.items() if name.startswith("ddp")}
    return cases


CASES = _cases()


def main(folder: Path, names: Sequence[str]) -> None:
    """Run the cases of these names; leave in ``folder``, case by case, what each raised or None."""
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=TIMEOUT)
    warnings.filterwarnings("error", message=".*returned a view")
    found: dict[str, str | None] = {}
    for name in names:
        case = CASES[name]
        extra = (folder / name,) if "saved" in name else ()
        try:
            if name != "guide":
                dist.init_process_group(
                    "gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=2, timeout=TIMEOUT
                )
            case(*extra)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        if dist.is_initialized():
            dist.destroy_process_group()
        (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
