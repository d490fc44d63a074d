"""The functions for many tokens against their definitions."""

from __future__ import annotations

import pytest
import torch

from cascade.kernels import prefill, reference


@pytest.mark.parametrize("span", [256, 4096])
@pytest.mark.parametrize("length", [1, 128, 129, 300, 700])
def test_scan(length: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "SCAN_SPAN", span)
    rows, heads, dim, groups, size = 2, 4, 8, 2, 16
    state = torch.randn(rows, heads, dim, size)
    scanned = torch.randn(rows, length, heads * dim + groups * size)
    dt = torch.rand(rows, length, heads)
    dt[1, length // 2 :] = 0  # a shorter row
    read = torch.randn(rows, length, groups, size)
    rest = read, -torch.rand(heads) - 0.1, torch.randn(heads)
    got, want = (
        prefill.ssm_scan(state, scanned, dt, *rest),
        reference.ssm_scan(state, scanned, dt, *rest),
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("start", "length"), [(0, 40), (7, 33), (60, 4), (63, 1)])
def test_attention(start: int, length: int) -> None:
    slots, held, kv_heads, heads, dim = 3, 64, 2, 6, 8
    keys, values = (torch.randn(slots, held, kv_heads, dim) for _ in range(2))
    query = torch.randn(2, length, heads, dim)
    spans = [(2, start), (0, start)]
    keys[:, start + length :] = values[:, start + length :] = 7.0  # of nobody
    for more in (0, 5):  # padded tokens, past the end of the slot where start + length is
        padded = torch.cat([query, query[:, :more]], 1)
        got = prefill.attention(padded, keys, values, spans)[:, :length]
        want = reference.attention(query, keys, values, spans)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 5, 700])
def test_experts(tokens: int, device: str) -> None:
    number, top_k, hidden, width = 16, 3, 48, 24
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    wider = torch.randn(2, number, width + 8, hidden + 8, device=device).bfloat16() / 8
    up, down = wider[0, :, :width, :hidden], wider[1].mT.contiguous()[:, :hidden, :width]
    chosen = torch.randn(tokens, number, device=device).topk(top_k, -1).indices
    chosen[chosen == 5] = 6  # an expert that nobody wants, and one that is wanted twice
    weights = torch.rand(tokens, top_k, device=device)
    got = prefill.experts(x, up, down, chosen, weights)
    want = reference.experts(x.float(), up.float(), down.float(), chosen, weights)
    assert (got.float() - want).norm() <= 1e-2 * want.norm()
