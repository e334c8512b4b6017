"""What must hold for DRM, LoRA-LEGO and LoRE alike: batches, memory, devices."""

from __future__ import annotations

import pytest
import torch
from golden import assert_close
from hypothesis import given
from hypothesis import strategies as st
from named_tools import close, merged, quick
from stacks import module, stacks

from merging.updates import UpdateStack


@quick
@given(
    stack=stacks(),
    method=st.sampled_from(["drm_h", "drm_v", "lora_lego", "lore"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_a_batch_is_its_modules_whatever_the_memory(
    stack: UpdateStack, method: str, dtype: torch.dtype
) -> None:
    stack = stack.to(dtype)
    together = merged(method, stack)
    assert together.dtype == dtype
    assert torch.isfinite(together).all()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for g in range(stack.G):
        close(together[g], merged(method, module(stack, g))[0], tolerance, stack.dense())
    assert torch.equal(merged(method, stack, budget=1), merged(method, stack, budget=1))
    close(together, merged(method, stack, budget=1), tolerance, stack.dense())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["drm_h", "drm_v", "lora_lego", "lore"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cuda_device_gives_the_same_products(method: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    B = tuple(torch.randn(3, 300, 8, generator=generator, dtype=dtype) for _ in range(4))
    A = tuple(torch.randn(3, 8, 200, generator=generator, dtype=dtype) for _ in range(4))
    stack = UpdateStack(("a", "b", "c"), (0, 1, 2, 3), B, A)
    there = UpdateStack(stack.names, stack.tasks, tuple(b.cuda() for b in B), tuple(a.cuda() for a in A))
    result = merged(method, there)
    assert result.is_cuda
    # A tie at the threshold of DRM may fall differently in float32.
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3 if method.startswith("drm") else 1e-4
    assert_close(result.cpu(), merged(method, stack), tolerance)
