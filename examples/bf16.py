"""Training in bfloat16, with weights of record in float32.

A bfloat16 number has 8 bits: h + Δ/L is h again as soon as Δ/L is below h/512. With states in bfloat16 a
network of many small steps stands still, and its gradients are another network's. A ``DeepResBlock`` has
weights, inputs and outputs in bfloat16, but states and sums in float32, so that depth does not matter.

Optimisers have the same trouble with small steps. Here they move weights in float32, which are rounded to
bfloat16 for the next forward. It prints

    gradient of the block in bfloat16: off by 0.2 %
    gradient of the loop in bfloat16: off by 36.8 %
    trained in float32  94.0 % of the rows are right
    trained in bfloat16 94.0 % of the rows are right
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from odeblock import DeepResBlock

WIDTH = 64


def loop(h: Tensor, V: Tensor, W: Tensor) -> Tensor:
    """The block in plain PyTorch, states in the dtype of h."""
    for v, w in zip(V, W, strict=True):
        h = h + nn.functional.linear(nn.functional.gelu(nn.functional.linear(h, w)), v) / len(V)
    return h


def gradient_errors(block: DeepResBlock, h: Tensor) -> dict[str, float]:
    """How far the gradient of W is from that in float64, in bfloat16 by the block and by the loop."""

    def gradient(run: nn.Module, dtype: torch.dtype) -> Tensor:
        V, W = (p.detach().bfloat16().to(dtype).requires_grad_() for p in (block.V, block.W))
        y = run(h.bfloat16().to(dtype), V, W)
        return torch.autograd.grad(y.float().square().sum(), W)[0].double()

    def through_block(h: Tensor, V: Tensor, W: Tensor) -> Tensor:
        return torch.func.functional_call(block, {"V": V, "W": W}, h)

    exact = gradient(loop, torch.float64)
    runs = {"block": through_block, "loop": loop}
    return {
        name: ((gradient(run, torch.bfloat16) - exact).norm() / exact.norm()).item()
        for name, run in runs.items()
    }


def train(master: nn.Module, x: Tensor, y: Tensor, epochs: int, dtype: torch.dtype) -> float:
    """Moves ``master``, in float32, by gradients in ``dtype``; returns the share of rows that are right."""
    model = copy.deepcopy(master).to(dtype)
    optimizer = torch.optim.Adam(master.parameters(), lr=1e-3)
    x = x.to(dtype)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[batch]).float(), y[batch]).backward()
            for weight, rounded in zip(master.parameters(), model.parameters(), strict=True):
                weight.grad = rounded.grad.float()
            optimizer.step()
            with torch.no_grad():
                for weight, rounded in zip(master.parameters(), model.parameters(), strict=True):
                    rounded.copy_(weight)
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def main(depth: int = 512, epochs: int = 5) -> dict[str, float]:
    torch.manual_seed(0)
    table, target = load_digits(return_X_y=True)
    x, y = torch.tensor(table / 16, dtype=torch.float32), torch.tensor(target)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, WIDTH), DeepResBlock(WIDTH, depth), nn.Linear(WIDTH, 10))

    model = make()
    results = gradient_errors(model[1], model[0](x[:64]).detach())
    for name, error in results.items():
        print(f"gradient of the {name} in bfloat16: off by {100 * error:.1f} %")
    for dtype in (torch.float32, torch.bfloat16):
        results[str(dtype)] = train(make(), x, y, epochs, dtype)
        print(f"trained in {str(dtype)[6:]:<8} {100 * results[str(dtype)]:.1f} % of the rows are right")
    return results


if __name__ == "__main__":
    main()
