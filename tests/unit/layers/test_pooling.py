"""Pooled rows: what numpy says in float64, the same bits in any company; also in Triton's interpreter."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moltron.layers.pooling import pool

RUNS = [[1, 5], [7, 8], [10, 200], [201, 299], [299, 300]]
HOWS = {"sum": np.sum, "max": np.max}


def check(hidden: torch.Tensor, dtype: torch.dtype, how: str, runs=RUNS) -> None:
    hidden = hidden.to(dtype)
    rows = torch.tensor(runs, dtype=torch.int32, device=hidden.device)
    found = pool(hidden, rows, how)
    assert found.dtype == torch.float32 and found.shape == (len(runs), hidden.shape[1])
    exact = hidden.double().cpu().numpy()
    expected = np.stack([HOWS[how](exact[begin:end], axis=0) for begin, end in runs])
    np.testing.assert_allclose(found.double().cpu().numpy(), expected, rtol=1e-6, atol=1e-5)
    for i, (begin, end) in enumerate(runs):
        alone = pool(hidden[begin:end].contiguous(), rows.new_tensor([[0, end - begin]]), how)
        assert torch.equal(alone[0], found[i])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("width", [80, 320])
def test_runs_of_rows(how, width):
    check(torch.randn(300, width), torch.float32, how)


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("width", [80, 256, 1280])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_runs_of_rows_on_cuda(how, width, dtype):
    hidden = torch.randn(300, width, device="cuda")
    check(hidden, dtype, how)
    check(hidden, dtype, how, RUNS[::-1])
    rows = torch.tensor([[0, 0], *RUNS, [0, 0]], dtype=torch.int32, device="cuda")
    empty = pool(hidden, rows, how)[[0, -1]]
    assert (empty == (0.0 if how == "sum" else -torch.inf)).all()


def interpreted() -> None:
    torch.cuda.device_of = lambda _: contextlib.nullcontext()  # type: ignore[assignment,misc]
    from moltron.layers.triton_pooling import pool_rows

    global pool
    pool = lambda hidden, rows, how: pool_rows(hidden, rows, how == "max")  # noqa: E731
    for how in HOWS:
        check(torch.randn(300, 80), torch.float32, how)
        check(torch.randn(300, 80), torch.bfloat16, how, RUNS[::-1])


def test_interpreted_kernel():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    interpreted()
