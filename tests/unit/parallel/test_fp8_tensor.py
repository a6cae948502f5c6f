"""FP8 products of a matrix that two ranks share are the whole one's: scales are powers of two, they round nothing."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moltron.layers.fp8 import Float8Linear
from moltron.parallel import collectives
from moltron.parallel.tensor import tensor_parallel

T, K, N = 32, 64, 96


def outcome(linear, x, g):
    """What comes out, and the gradients of the input, weight and bias."""
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(g)
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in linear.parameters()]
    return [y.detach(), x.grad, *gradients]


def made(fp8):
    torch.manual_seed(0)
    linear = nn.Linear(K, N).bfloat16()
    if fp8:
        Float8Linear.swap(linear, "tensorwise")
    return linear


def on_rank():
    collectives.init("cpu")
    rank, mesh = collectives.rank(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(1)
    x, g = torch.randn(T, K).bfloat16(), torch.randn(T, N).bfloat16()
    tokens, columns, width = (slice(rank * n // 2, (rank + 1) * n // 2) for n in (T, N, K))
    whole, exact = (outcome(made(fp8), x, g) for fp8 in (True, False))
    parts = {
        "column": ((tokens, slice(None)), (slice(None), columns)),  # of x and its gradient, of y and its
        "row": ((slice(None), width), (tokens, slice(None))),
    }
    for style, (of_x, of_y) in parts.items():
        model = nn.ModuleDict({"linear": made(fp8=True)})
        tensor_parallel(model, {"linear": style}, mesh)
        found = outcome(model["linear"], x[of_x], g[of_y])
        own = [[values[0][of_y], values[1][of_x], *values[2:]] for values in (whole, exact)]
        for value, same, near in zip(found, *own, strict=True):
            apart = [((value - other).float().norm() / other.float().norm()).item() for other in (same, near)]
            print(style, *(f"{a:.4f}" for a in apart))
            assert apart[0] < 5e-3 and (value.ndim == 1 or apart[1] > 0.01)
    collectives.shutdown()


def test_the_parts_of_a_product_make_the_whole_one(ranks_of):
    with ranks_of(__file__) as outputs:
        pass
    assert all(output.count("column") == output.count("row") == 4 for output in outputs)


if __name__ == "__main__":
    on_rank()
