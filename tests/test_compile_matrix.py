"""Every kernel compiles for every GPU, uses its matrix units, fits, and spills nothing. No GPU is needed."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest

from triton_compile import ARCHS, KERNELS, SHARED, compile_files

FLOAT = {"sm": r"mma\.sync.*(bf16|f16)|tcgen05", "gfx9": r"v_mfma_f32", "gfx1": r"v_wmma_f32"}
INT8 = {"sm": r"mma\.sync.*s8|tcgen05.*i8", "sm90": r"wgmma.*s8", "gfx9": r"v_mfma_i32.*i8", "gfx1": r"v_wmma_i32.*iu8"}
EIGHT = {"sm": r"mma\.sync.*(s8|e4m3)", "sm90": r"mma.*(s8|e4m3)", "sm100": r"mma\.sync.*s8|tcgen05.*(i8|f8f6f4)"}
EIGHT |= {"gfx9": r"v_mfma_i32.*i8", "gfx1": r"v_wmma_(i32.*iu8|f32.*fp8)"}
NVFP4 = {
    "sm": r"mma.*f16",
    "sm100": "mxf4nvf4",
    "sm120": "mxf4nvf4",
    "gfx9": r"v_mfma_f32.*f16",
    "gfx1": r"v_wmma.*f16",
}
NONE = {"": ""}  # bound by memory: no matrix units

TWIN = "sm86"  # compiled as sm89 is: the same tiles, instructions and limits, but for e4m3
COMPILED = [arch for arch in ARCHS if arch != TWIN]

# The instruction that every case of a kernel must have, by the longest prefix of the architecture.
MATRIX: dict[str, dict[str, str]] = {
    "quantize_act": FLOAT,
    "gemm_w4a4": INT8,
    "gemm_w4a4_gelu": INT8,
    "quantize_token": FLOAT,
    "widen_w4": NONE,
    "gemm_w8a8": EIGHT,
    "gemm_w4a8": EIGHT,
    "gemm_w4a16": NONE,
    "quantize_nvfp4": FLOAT,
    "gemm_nvfp4": NVFP4,
}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict]]:
    """The results of a kernel file. The files that tests ask for are compiled at once, two at a time."""
    asked = {item.callspec.params.get("file") for item in request.session.items if hasattr(item, "callspec")}
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        running = {file: pool.submit(compile_files, [file], cache, COMPILED) for file in MATRIX if file in asked}
        yield lambda file: running[file].result()


@pytest.mark.parametrize("arch", COMPILED)
@pytest.mark.parametrize("file", MATRIX)
def test_compiles(compiled: Callable[[str], list[dict[str, Any]]], file: str, arch: str):
    results = [r for r in compiled(file) if r["arch"] in (arch, "")]
    assert results, f"{file}: nothing was compiled for {arch}"
    pattern = MATRIX[file][max((prefix for prefix in MATRIX[file] if arch.startswith(prefix)), key=len)]
    for r in results:
        assert "error" not in r, r["error"]
        assert r["shared"] <= SHARED[arch], r["case"]
        if r["case"] == "float32":
            continue  # right, not fast: on most parts such products have no matrix units
        assert not pattern or any(re.search(pattern, name) for name in r["matrix"]), (r["case"], r["matrix"])
        assert r["spills"] == 0, r["case"]


@pytest.mark.parametrize("file", MATRIX)
def test_twin(file: str):
    """What the matrix compiles for sm89 is what sm86 would get; its fp8 cases are more."""
    cases = import_module(f"comfyui_svdquant.triton_kernels.{file}").compile_cases
    assert cases("sm89").items() >= cases(TWIN).items() and SHARED["sm89"] == SHARED[TWIN]


def test_no_kernel_is_left_out():
    assert set(KERNELS) == set(MATRIX)
