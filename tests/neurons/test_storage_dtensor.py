"""Storage of DTensors: in a group of one process, and as each of several processes sees it, without communication."""

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_recycle import find_feed_forwards
from hf_recycle.neurons.blocks import NeuronSlice, whole_slices
from hf_recycle.neurons.optimizer_state import check_optimizer, reset_state
from hf_recycle.neurons.storage import storage_of
from hf_recycle.neurons.storage.dtensor import DTensorStorage, _local_tiles, _owned
from hf_recycle.neurons.storage.plain import PlainStorage

D_MODEL, D_FF = 4, 6
INDEX = torch.tensor([4, 0, 3])


def slice_of(values: Tensor, dim: int = 0, offset: int = 0, length: int | None = None) -> NeuronSlice:
    holder = nn.Module()
    attribute = "weight" if values.dim() == 2 else "bias"
    holder.register_parameter(attribute, nn.Parameter(values.clone()))
    role = "in" if attribute == "weight" else "in.bias"
    return NeuronSlice(role, holder, attribute, dim, offset, values.shape[dim] if length is None else length)


def slice_of_expert(values: Tensor, expert: int, dim: int = 0, offset: int = 0, stride: int = 1) -> NeuronSlice:
    holder = nn.Module()
    attribute = "weight" if values.dim() == 3 else "bias"
    holder.register_parameter(attribute, nn.Parameter(values.clone()))
    length = (values.shape[1 + dim] - offset + stride - 1) // stride
    role = "in" if attribute == "weight" else "in.bias"
    return NeuronSlice(role, holder, attribute, dim, offset, length, stride, expert)


def distributed(piece: NeuronSlice, mesh: DeviceMesh, placements) -> NeuronSlice:
    """The same slice of a DTensor."""
    holder = nn.Module()
    sharded = distribute_tensor(piece.parameter.detach().clone(), mesh, placements, src_data_rank=None)
    holder.register_parameter(piece.attribute, nn.Parameter(sharded))
    return replace(piece, module=holder)


# ---- One process, a real group ----


@pytest.fixture
def mesh(tmp_path) -> Iterator[DeviceMesh]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


PIECES = {
    "rows": lambda: slice_of(torch.randn(D_FF, D_MODEL)),
    "columns": lambda: slice_of(torch.randn(D_MODEL, D_FF), dim=1),
    "second-half-of-rows": lambda: slice_of(torch.randn(2 * D_FF, D_MODEL), offset=D_FF, length=D_FF),
    "second-half-of-columns": lambda: slice_of(torch.randn(D_MODEL, 2 * D_FF), dim=1, offset=D_FF, length=D_FF),
    "bias": lambda: slice_of(torch.randn(D_FF)),
    "second-half-of-bias": lambda: slice_of(torch.randn(2 * D_FF), offset=D_FF, length=D_FF),
}
ALONE = [
    pytest.param(piece, placement, id=f"{name}-{placement}")
    for name, piece in PIECES.items()
    for placement in (Shard(0), Shard(1), Replicate())
    if "bias" not in name or placement != Shard(1)
]


@pytest.mark.parametrize(("make", "placement"), ALONE)
def test_a_dtensor_is_as_good_as_a_plain_tensor(mesh, make, placement):
    plain_piece = make()
    piece = distributed(plain_piece, mesh, [placement])
    storage, plain = storage_of(piece.parameter), PlainStorage()
    assert type(storage) is DTensorStorage

    def same():
        assert torch.equal(piece.parameter.full_tensor(), plain_piece.parameter)

    torch.testing.assert_close(storage.norms([piece], torch.float32)[0], plain.norms([plain_piece], torch.float32)[0])
    assert torch.equal(torch.stack(storage.mean_std(piece)), torch.stack(plain.mean_std(plain_piece)))
    lines = storage.read_full(piece, INDEX)
    assert not isinstance(lines, DTensor)
    assert torch.equal(lines, plain.read_full(plain_piece, INDEX))
    assert torch.equal(storage.gather(piece, INDEX, storage.shard(piece, INDEX, 2 * lines)), 2 * lines)
    same()

    new, factors = torch.randn(lines.shape), torch.rand(D_FF)
    for one, its_piece in ((storage, piece), (plain, plain_piece)):
        one.write_full(its_piece, INDEX, new)
        one.scale(its_piece, factors)
    assert not torch.equal(storage.read_full(piece, INDEX), lines)
    same()

    plain_piece.parameter.grad = torch.randn(plain_piece.parameter.shape)
    storage.scale_gradient(piece, INDEX, factors[INDEX])  # there is none yet
    piece.parameter.grad = distribute_tensor(plain_piece.parameter.grad, mesh, [placement])
    for one, its_piece in ((storage, piece), (plain, plain_piece)):
        one.scale_gradient(its_piece, INDEX, factors[INDEX])
    assert torch.equal(piece.parameter.grad.full_tensor(), plain_piece.parameter.grad)
    same()


@pytest.mark.parametrize("shape", [(), (6,), (6, 4), (3, 2, 4), (3, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("placement", [None, Shard(0), Replicate()], ids=str)
def test_all_of_a_parameter_of_any_shape(mesh, shape, placement):
    """Also of one that is called a bias and is no column."""
    values, holder = torch.randn(shape), nn.Module()
    if placement is not None:
        if not shape and placement == Shard(0):
            pytest.skip("a number can't be cut")
        values = distribute_tensor(values, mesh, [placement])
    holder.position_bias = nn.Parameter(values.clone())
    [piece] = whole_slices(holder, ["position_bias"]).values()
    storage, lines = piece.storage, piece.lines()
    values = values.full_tensor() if placement is not None else values
    assert torch.equal(storage.gather(piece, lines, storage.read(piece, lines)).view(shape), values)
    for tile, part in zip(storage.tiles(piece), storage.shard(piece, lines, 2 * values), strict=True):
        tile.values.copy_(part)
    found = piece.parameter.detach()
    assert torch.equal(found.full_tensor() if placement is not None else found, 2 * values)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("mode", ["reset", "zero"])
def test_optimizer_state(mesh, placement, mode):
    """Moments that are DTensors; and the model computes and trains on afterwards."""
    model = nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.ReLU(), nn.Linear(D_FF, D_MODEL))
    sharded = copy.deepcopy(model)
    for linear in (sharded[0], sharded[2]):
        for name, parameter in list(linear.named_parameters()):
            setattr(linear, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    x = torch.randn(5, D_MODEL)
    optimizers = []
    for each in (model, sharded):
        inputs = x if each is model else distribute_tensor(x, mesh, [Replicate()])
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(inputs).square().sum().backward()
            optimizer.step()
            reset_state(optimizer, find_feed_forwards(each)[0], INDEX, mode)
        optimizers.append(optimizer)
    for mine, theirs in zip(model.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(theirs.full_tensor(), mine)
        for key in ("exp_avg", "exp_avg_sq"):
            expected, found = (o.state[p][key] for o, p in zip(optimizers, (mine, theirs), strict=True))
            torch.testing.assert_close(found.full_tensor(), expected)
    state = optimizers[1].state[sharded[0].weight]
    assert isinstance(state["exp_avg"], DTensor)
    assert not state["exp_avg"].full_tensor()[INDEX].any()


# ---- Several processes, each in turn, in a group that sends nothing ----


@contextmanager
def as_rank(rank: int, shape: tuple[int, ...]) -> Iterator[DeviceMesh]:
    world = torch.Size(shape).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        # Named by rank: torch takes a mesh of the same shape and names for the one it has seen before, as another rank.
        yield init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"rank{rank}dim{i}" for i in range(len(shape))))
    finally:
        dist.destroy_process_group()


def check_tiles(piece: NeuronSlice, covered: Tensor) -> None:
    """Every tile of a parameter whose entries are their own numbers holds what it says it does."""
    numbers = torch.arange(float(piece.parameter.numel())).view(piece.parameter.shape)
    numbers = numbers if piece.expert is None else numbers[piece.expert]
    numbers = numbers.unsqueeze(1) if piece.attribute == "bias" else numbers
    lines = numbers.transpose(0, piece.dim)[piece.offset :: piece.stride][: piece.length]
    tiles = piece.storage.tiles(piece)
    for tile in tiles:
        assert torch.equal(tile.values, lines[tile.neurons, tile.features])
        covered[tile.neurons, tile.features] += 1
    held = torch.isin(piece.parameter.to_local().detach(), lines.contiguous())
    assert sum(tile.values.numel() for tile in tiles) == int(held.sum())


PLACEMENTS = [
    ((3,), (Shard(0),)),
    ((3,), (Shard(1),)),
    ((2,), (Replicate(),)),
    ((9,), (Shard(0),)),  # more processes than rows
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 2), (Shard(0), Replicate())),
    ((2, 3), (Shard(0), Shard(1))),
    ((2, 3), (Shard(1), Shard(0))),
    ((3, 2), (Shard(0), Shard(0))),
    ((4, 3), (Shard(0), Shard(0))),
    ((2, 2, 2), (Shard(0), Replicate(), Shard(0))),
]


@pytest.mark.parametrize(("shape", "placements"), PLACEMENTS, ids=str)
@pytest.mark.parametrize("size", [(6, 4), (7, 5), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_local_tiles_of_every_process(shape, placements, size, dim):
    """Even and uneven sizes, and empty shards: each weight is in the tiles of as many processes as there are copies."""
    covered = torch.zeros(size).transpose(0, dim)
    for rank in range(torch.Size(shape).numel()):
        with as_rank(rank, shape) as mesh:
            piece = slice_of(torch.arange(float(size[0] * size[1])).view(size), dim)
            check_tiles(distributed(piece, mesh, placements), covered)
    copies = torch.Size(
        [n for n, placement in zip(shape, placements, strict=True) if isinstance(placement, Replicate)]
    ).numel()
    assert torch.equal(covered, torch.full_like(covered, copies))


@pytest.mark.parametrize(
    ("shape", "placements"), [*PLACEMENTS, ((3,), (Shard(2),)), ((2, 2), (Shard(1), Shard(2)))], ids=str
)
@pytest.mark.parametrize(("dim", "stride"), [(0, 1), (1, 2)])
def test_local_tiles_of_an_expert(shape, placements, dim, stride):
    """A process may hold some experts whole, or some rows or columns of each."""
    size = torch.Size((3, 4, 6))
    for values in (torch.arange(72.0).view(size), torch.arange(12.0).view(3, 4)):
        if values.dim() == 2 and (dim or any(p.is_shard(2) for p in placements)):
            continue
        pieces = [
            slice_of_expert(values, expert, dim, offset, stride) for expert in range(3) for offset in range(stride)
        ]
        covered = [torch.zeros(piece.length, piece.width) for piece in pieces]
        for rank in range(torch.Size(shape).numel()):
            with as_rank(rank, shape) as mesh:
                for piece, times in zip(pieces, covered, strict=True):
                    check_tiles(distributed(piece, mesh, placements), times)
        copies = [n for n, placement in zip(shape, placements, strict=True) if isinstance(placement, Replicate)]
        assert all(torch.equal(times, torch.full_like(times, math.prod(copies))) for times in covered)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_halves_of_a_fused_parameter(world, half, dimensions):
    """A process may hold lines of one half only, of both, or of none."""
    columns = 3 if dimensions == 2 else 1
    covered = torch.zeros(4, columns)
    for rank in range(world):
        with as_rank(rank, (world,)) as mesh:
            values = torch.arange(8.0 * columns).view(8, columns)
            piece = slice_of(values if dimensions == 2 else values.flatten(), offset=4 * half, length=4)
            check_tiles(distributed(piece, mesh, [Shard(0)]), covered)
    assert torch.equal(covered, torch.ones_like(covered))


def test_an_empty_shard_takes_part_in_everything():
    """More processes than rows: the last one holds nothing, and no operation fails on it."""
    with as_rank(4, (5,)) as mesh:
        for values in (torch.randn(3, 4), torch.randn(3)):
            piece = distributed(slice_of(values), mesh, [Shard(0)])
            storage, index = piece.storage, torch.tensor([2, 0])
            assert piece.parameter.to_local().numel() == 0
            assert storage.tiles(piece) == []
            assert torch.equal(_owned(piece.parameter, 0, 3), torch.empty(0, dtype=torch.int64))
            assert not storage.norms([piece], torch.float32)[0].any()
            storage.mean_std(piece)
            lines = storage.read_full(piece, index)
            assert lines.shape == (2, *values.shape[1:])
            assert storage.shard(piece, index, lines) == []
            storage.write_full(piece, index, lines)
            storage.scale(piece, torch.ones(3))
            storage.mean_of_others(piece, [], index, piece.width)
            piece.parameter.grad = piece.parameter.detach().clone()
            assert _local_tiles(piece, piece.parameter.grad) == []
            storage.scale_gradient(piece, index, torch.ones(2))


def chunk(values: Tensor, parts: int, number: int, dim: int = 0) -> Tensor:
    chunks = values.chunk(parts, dim)
    return chunks[number] if number < len(chunks) else values.narrow(dim, 0, 0)


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("d_ff", [12, 7, 3])
def test_fsdp2_of_what_tensor_parallelism_has_cut(data, tensor, d_ff):
    """`fully_shard` cuts rows that `ColwiseParallel` has cut already: the strided sharding, also of uneven sizes."""
    d_model = 2
    covered = {"in": torch.zeros(d_ff, d_model), "in.bias": torch.zeros(d_ff, 1), "out": torch.zeros(d_ff, d_model)}
    for rank, (i, j) in enumerate(itertools.product(range(data), range(tensor))):
        model = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.arange(float(parameter.numel())).view(parameter.shape))
        whole = copy.deepcopy(model)
        pieces = find_feed_forwards(model)[0].slices
        with as_rank(rank, (data, tensor)) as mesh:
            data_mesh, tensor_mesh = (mesh[name] for name in mesh.mesh_dim_names)
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(model, tensor_mesh, plan, src_data_rank=None)
            fully_shard(model, mesh=data_mesh)
            expected = chunk(chunk(whole[0].weight, tensor, j), data, i)
            assert torch.equal(model[0].weight.to_local(), expected), "what torch does, this test must know"
            expected = chunk(chunk(whole[2].weight, tensor, j, dim=1), data, i)
            assert torch.equal(model[2].weight.to_local(), expected)
            for piece in pieces:
                check_tiles(piece, covered[piece.role])
    assert all(torch.equal(times, torch.ones_like(times)) for times in covered.values())


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, transformers.Adafactor])
def test_adafactor_on_sharded_parameters_is_refused(mesh, optimizer):
    """transformers' Adafactor itself can't step there."""
    linear = nn.Linear(D_MODEL, D_FF, bias=False)
    check_optimizer(optimizer(linear.parameters()), "recycle_steps", 3)
    fully_shard(linear, mesh=mesh)
    with pytest.raises(ValueError, match=r"recycle_steps=3 can't be used with Adafactor: its factored state"):
        check_optimizer(optimizer(linear.parameters()), "recycle_steps", 3)
    check_optimizer(torch.optim.AdamW(linear.parameters()), "recycle_steps", 3)
