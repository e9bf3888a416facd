"""Whether a CPU has arithmetic for bfloat16, against what the operating system and made-up CPUs say."""

import platform
from pathlib import Path

import pytest
import torch

from nnunet_ssl.runtime.cpu import cpu_has_bfloat16

CPU_INFO = Path("/proc/cpuinfo")


def dispatches(monkeypatch, answer: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: answer)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPU_INFO.is_file(), reason="only Linux on x86 lists what its CPU can do"
)
def test_bfloat16_as_the_operating_system_lists_it():
    assert cpu_has_bfloat16() == ("avx512_bf16" in CPU_INFO.read_text().split())


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        ({"avx512_f": True, "avx512_vnni": True, "avx512_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True}, False),
    ],
)
@pytest.mark.parametrize("dispatched", [True, False])
def test_bfloat16_is_there_where_the_cpu_has_it_and_pytorch_uses_it(monkeypatch, capabilities, has, dispatched):
    """PyTorch uses it with AVX-512 alone too, where it has to be emulated: twice as slow as float32."""
    dispatches(monkeypatch, dispatched)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_has_bfloat16() == (has and dispatched)


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_with_an_older_pytorch(monkeypatch, has):
    dispatches(monkeypatch, True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert cpu_has_bfloat16() == has
