"""What calibration, sensitivity runs and the quality table compute on a GPU is the method's definition."""

import pytest
import torch
from torch import nn

from lynx_compile.profile import Branch
from lynx_compile.runtime import kernels

SHAPES = ((512, 256, 256, 256), (64, 288, 256, 1024), (512, 32, 1280, 256), (3, 288, 320, 1280))  # B, T, K, N


def branches(k: int, n: int) -> dict[str, Branch]:
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, device="cuda")).bfloat16()

    factors = {"down": normal(16, k, scale=k**-0.5), "up": normal(n, 16, scale=0.1)}
    return {
        "norm": Branch(),
        "native": Branch(compensation="native"),
        "shift and branch": Branch(shift=normal(k, scale=0.2), **factors),
        "text dense": Branch(dense_tokens=8, **factors),
        "last text dense": Branch(dense_tokens=-8, **factors),
        "deflated": Branch(shift=normal(k, scale=0.2), deflate=True, **factors),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["norm", "native", "shift and branch", "text dense", "deflated"])
def test_branch_by_kernels_is_its_definition(kind: str, shape: tuple[int, int, int, int]) -> None:
    batch, tokens, k, n = shape
    if missing := kernels.unavailable_reason(torch.device("cuda", 0), torch.bfloat16):
        pytest.skip(missing)
    torch.manual_seed(0)
    layer = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    x = (torch.randn(batch, tokens, k, device="cuda") + 0.3).bfloat16()
    branch = branches(k, n)[kind]
    with torch.no_grad():
        found = branch(layer, x).float()
    with torch.enable_grad():  # kernels run without gradients only
        exact = branch(layer, x).detach().float()
    # Deflation by two products rounds otherwise: in a few groups another of two near-equal channels is kept.
    assert (found - exact).norm() < (6e-2 if branch.deflate else 6e-3) * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("compensation", ["norm", "native"])
def test_calibration_on_the_gpu_is_that_on_the_cpu(compensation: str) -> None:
    from lynx_compile.calibration import Inputs, calibrate
    from tests.test_calibration import make_workload

    profiles = []
    for device in ("cpu", "cuda"):
        workload = make_workload()
        workload = Inputs(workload.model.to(device), [x.to(device) for x in workload.inputs])
        profiles.append(calibrate(workload, rank=8, compensation=compensation, quiet=True).layers)
    for name, layer in profiles[0].items():
        other = profiles[1][name]
        assert other.error_after == pytest.approx(layer.error_after, rel=1e-3)
        product, expected = (b.down.cpu().T @ b.down.cpu() for b in (other.branch, layer.branch))
        assert (product - expected).norm() < 1e-2 * expected.norm()
