"""Every kernel inside a CUDA graph, on a stream of one's own, and after many calls."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.kernels import reference

pytestmark = pytest.mark.gpu

L, S, J, H, P, N, G, C, M = 2, 4, 9, 4, 32, 64, 2, 96, 80


class World:
    """A small cache and one call of every function on it."""

    def __init__(self) -> None:
        self.state = torch.randn(L, S, H, P, N, device="cuda")
        self.window = torch.randn(L, S, 3, C, device="cuda")
        self.keys, self.values = (torch.randn(L, S, M, 2, 16, device="cuda") for _ in "kv")
        self.provenance = torch.full((S, M), -1, device="cuda", dtype=torch.int8)
        self.scanned = torch.randn(L, S, J, H * P + G * N, device="cuda")
        self.dt = torch.rand(L, S, J, H, device="cuda")
        self.inputs = torch.randn(L, S, J, C, device="cuda")
        self.forks = torch.tensor([1], device="cuda")
        self.decay = -torch.rand(L, H, device="cuda")
        self.rows = torch.tensor([3, 0, 2], device="cuda")
        self.counts = torch.tensor([8, 0, 5], device="cuda")
        self.starts = torch.tensor([0, 10, 70], device="cuda")
        self.kept = torch.tensor([[1, 3, 4], [0, -1, -1], [2, 8, -1]], device="cuda")
        self.writers = torch.tensor([0, 1, 2], device="cuda")
        self.target = torch.randn(3, 4, 2000, device="cuda").softmax(-1)
        self.draft = torch.randn(3, 3, 2000, device="cuda").softmax(-1)
        self.ids = torch.randint(2000, (3, 3), device="cuda")
        self.drafted = torch.tensor([3, 0, 2], device="cuda")

    def parts(self) -> list[Tensor]:
        return [self.state, self.window, self.keys, self.values, self.provenance, self.scanned]

    def run(self, kernels: ModuleType) -> list[Tensor]:
        rows, counts = self.rows, self.counts
        kernels.ssm_commit(self.state, self.scanned, self.dt, self.decay, rows, rows, counts)
        kernels.conv_commit(self.window, self.inputs, rows, rows, counts)
        kernels.journal_keep([self.scanned], [self.scanned], rows, rows, counts)
        kernels.kv_compact(self.keys, self.values, rows, self.starts, self.kept)
        kernels.provenance_stamp(self.provenance, rows, self.starts, counts, self.writers)
        kernels.fork_copy(self.keys, self.values, self.window, self.state, 3, self.forks, 20)
        digests = kernels.cache_digest(
            self.keys, self.values, self.window, self.state, rows, self.starts
        )
        drawn = kernels.race_sample(self.target[:, 0].contiguous(), self.starts, counts)
        accepted = kernels.accept_resample(
            self.target, self.draft, self.ids, self.drafted, self.starts, counts
        )
        return [*digests, drawn, *accepted]


def restore(world: World, saved: list[Tensor]) -> None:
    for part, old in zip(world.parts(), saved, strict=True):
        part.copy_(old)


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def outcome(world: World, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    results = run()
    torch.cuda.synchronize()
    return [*(r.clone() for r in results), *(part.clone() for part in world.parts())]


def test_results_do_not_change_from_run_to_run(cuda: ModuleType) -> None:
    world = World()
    saved = [part.clone() for part in world.parts()]
    first = outcome(world, lambda: world.run(cuda))
    for _ in range(20):
        restore(world, saved)
        assert_same(outcome(world, lambda: world.run(cuda)), first)


def test_on_a_stream_of_its_own(cuda: ModuleType) -> None:
    """Work queued on torch's current stream is seen; nothing leaks to the default stream."""
    world = World()
    saved = [part.clone() for part in world.parts()]
    wanted = outcome(world, lambda: world.run(cuda))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        world.state.fill_(float("nan"))
        torch.cuda._sleep(20_000_000)  # about 10 ms: a launch elsewhere would overtake
        restore(world, saved)
        results = world.run(cuda)
    stream.synchronize()
    assert_same([*results, *world.parts()], wanted)


def test_inside_a_captured_graph(cuda: ModuleType) -> None:
    world = World()
    saved = [part.clone() for part in world.parts()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        world.run(cuda)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = world.run(cuda)

    for counts, seed in (([8, 0, 5], 1), ([1, 7, 0], 2)):  # other numbers, same graph
        world.counts.copy_(torch.tensor(counts))
        torch.manual_seed(seed)
        fresh = [torch.randn_like(s) if s.is_floating_point() else s for s in saved]
        restore(world, fresh)
        graph.replay()
        got = outcome(world, lambda: captured)
        restore(world, fresh)
        wanted = outcome(world, lambda: world.run(cuda))
        assert_same(got, wanted)


def test_the_world_agrees_with_the_reference(cuda: ModuleType) -> None:
    world = World()
    saved = [part.clone() for part in world.parts()]
    got: list[Any] = outcome(world, lambda: world.run(cuda))
    state = world.state.clone()
    restore(world, saved)
    world.run(reference)
    torch.testing.assert_close(state, world.state, rtol=1e-5, atol=1e-5)
    for a, b in zip(got[6:], world.parts()[1:], strict=True):  # all but the state, bit for bit
        assert torch.equal(a, b)
