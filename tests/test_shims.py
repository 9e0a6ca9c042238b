"""The three stand-ins of the cpu stack: that SGLang still wants exactly these names, and that none computes anything."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from realstack import real_stack

from lab.stacks.check import python_of, site_packages
from lab.stacks.run import child_env

SHIMS = Path(__file__).parents[1] / "containers" / "cpu" / "shims"

# Run in the stack's Python after SGLang's server and scheduler were imported; prints what it found.
FACTS = """
import json, multiprocessing, sys, types

def raised(action):
    try:
        return f"returned {action()!r}"
    except Exception as error:
        return type(error).__name__

def in_child(queue):
    import sglang, triton, torchvision
    queue.put([type(triton).__module__, torchvision.__version__])

if __name__ == "__main__":
    started_with_torch = "torch" in sys.modules
    import torch
    metal_before = sorted(vars(torch.mps))
    import sglang.srt.managers.scheduler, sglang.srt.entrypoints.http_server
    import sgl_kernel, torchvision, triton
    from sglang.srt.mem_cache import allocation
    from sglang.srt.utils import common
    boxes, scores = torch.zeros(1, 4), torch.zeros(1)

    @triton.jit
    def kernel(x):
        return x

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    print(json.dumps({
        "started_with_torch": started_with_torch,
        "sgl_kernel_file": sgl_kernel.__file__,
        "sgl_kernel": {name: raised(lambda f=getattr(sgl_kernel, name): f(1, x=2)) for name in sgl_kernel.NAMES},
        "used_by_sglang": allocation.assign_req_to_token_pool_cpu is sgl_kernel.assign_req_to_token_pool_cpu,
        "amx_op": hasattr(torch.ops.sgl_kernel, "convert_weight_packed"),
        "amx_in_sglang": common.cpu_has_amx_support(),
        "nms_op": raised(lambda: torch.ops.torchvision.nms(boxes, scores, 0.5)),
        "qnms_op": raised(lambda: torch.ops.torchvision.qnms(boxes, scores, 0.5)),
        "nms": raised(lambda: torchvision.ops.nms(boxes, scores, 0.5)),
        "launch": raised(lambda: kernel[(1,)](boxes)),
        "sglang_launch": raised(lambda: allocation.write_req_to_token_pool_triton[(1,)](boxes)),
        "triton_from": type(triton).__module__,
        "tensor_to": type(torch.Tensor.to).__name__,
        "tensor_copy": type(torch.Tensor.copy_).__name__,
        "metal_added": sorted(set(vars(torch.mps)) - set(metal_before)),
        "metal_available": torch.backends.mps.is_available(),
        "platform": sys.platform,
        "child": queue.get(timeout=60),
    }))
    child.join()
"""


@cache
def facts(folder: Path) -> dict[str, object]:
    """What FACTS prints, from the stack's own Python (about 20 seconds)."""
    script = folder.parent / ".shim-facts.py"
    script.write_text(FACTS)
    stack, _ = real_stack()
    try:
        done = subprocess.run(
            (str(python_of(folder)), str(script)),
            env={**child_env(os.environ), **dict(stack.env)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def found() -> dict[str, object]:
    return facts(real_stack()[1])


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpu_names(source: str) -> set[str]:
    """The names ending in _cpu that Python source imports from `sgl_kernel` with nothing to catch a failure."""
    found: set[str] = set()

    def visit(node: ast.AST, *, guarded: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.module == "sgl_kernel" and not guarded:
                found.update(alias.name for alias in child.names if alias.name.endswith("_cpu"))
            visit(child, guarded=guarded or isinstance(child, ast.Try))

    visit(ast.parse(source), guarded=False)
    return found


def test_the_search_for_names_sees_what_it_should() -> None:
    source = """
from sgl_kernel import plain, a_cpu
if cpu:
    from sgl_kernel import b_cpu as c_cpu
def f():
    from sgl_kernel import d_cpu
try:
    from sgl_kernel import e_cpu
except ImportError:
    pass
from sgl_kernel.mamba import g_cpu
from other import h_cpu
"""
    assert cpu_names(source) == {"a_cpu", "b_cpu", "d_cpu"}


def test_sglang_imports_exactly_the_kernels_that_the_shim_names() -> None:
    stack, folder = real_stack()
    wanted: set[str] = set()
    for file in (site_packages(stack, folder) / "sglang").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        if "sgl_kernel" in source:
            wanted |= cpu_names(source)
    assert wanted == set(load("shim", SHIMS / "sgl_kernel" / "__init__.py").NAMES)


def test_every_kernel_of_the_shim_raises_and_says_its_name() -> None:
    shim = load("shim", SHIMS / "sgl_kernel" / "__init__.py")
    assert len(shim.NAMES) == 10
    for name in shim.NAMES:
        with pytest.raises(NotImplementedError, match=rf"sgl_kernel\.{name} "):
            getattr(shim, name)(1, x=2)
    assert not hasattr(shim, "convert_weight_packed")


def test_torchvision_registers_exactly_the_operators_that_the_shim_declares() -> None:
    stack, folder = real_stack()
    package = site_packages(stack, folder) / "torchvision"
    registered: set[str] = set()
    for file in package.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        if "register_fake" in source:
            registered |= fake_registrations(source)
    assert {f"torchvision::{name}" for name in declared_operators()} == registered


def fake_registrations(source: str) -> set[str]:
    """The operators for which module-level functions are decorated with torch.library.register_fake."""
    return {
        str(decorator.args[0].value)
        for function in ast.parse(source).body
        if isinstance(function, ast.FunctionDef)
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call)
        and ast.unparse(decorator.func) == "torch.library.register_fake"
        and isinstance(decorator.args[0], ast.Constant)
    }


def declared_operators() -> tuple[str, ...]:
    """OPERATORS of the torchvision shim, read without torch, which the lab's environment does not have."""
    for node in ast.parse((SHIMS / "lab_cpu_shims" / "torchvision.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPERATORS":
            value = ast.literal_eval(node.value)
            assert isinstance(value, tuple)
            return value
    raise AssertionError("the shim has no OPERATORS")


def test_sglang_still_has_the_stand_in_for_triton_that_the_shim_uses() -> None:
    stack, folder = real_stack()
    tree = ast.parse((site_packages(stack, folder) / "sglang" / "_platform_stubs.py").read_text())
    functions = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    installer = functions["install_platform_stubs"]
    # all that the shim answers or takes back: a new condition or a new patch must be looked at
    assert "sys.platform != 'darwin' or platform.machine() != 'arm64'" in installer
    assert "torch.backends.mps.is_available()" in installer
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "install_platform_stubs")
    assert sum(isinstance(n, ast.Return) and n.value is None for n in ast.walk(node)) == 4
    assert "_patch_non_blocking()" in installer
    assert "mps = torch.mps" in installer
    assert "torch." not in installer.replace("torch.backends.mps.is_available", "").replace("torch.mps", "")


def test_the_shims_start_with_python_and_cost_nothing_until_needed() -> None:
    _, folder = real_stack()
    code = "import sys; print(sorted({'torch', 'sglang', 'triton', 'torchvision'} & set(sys.modules)))"
    code += "; print([f.package for f in sys.meta_path if type(f).__name__ == 'BeforeFirstImport'])"
    done = subprocess.run((str(python_of(folder)), "-c", code), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['torchvision', 'sglang']"]


def test_every_kernel_raises_in_the_stack_where_sglang_imported_it(found: dict[str, object]) -> None:
    kernels = found["sgl_kernel"]
    assert isinstance(kernels, dict)
    assert set(kernels.values()) == {"NotImplementedError"}
    assert found["used_by_sglang"] is True
    assert not found["started_with_torch"]


def test_sglang_does_not_take_the_shim_for_amx_kernels(found: dict[str, object]) -> None:
    assert found["amx_op"] is False
    assert found["amx_in_sglang"] is False


def test_the_declared_torchvision_operators_raise(found: dict[str, object]) -> None:
    assert found["nms_op"] == "NotImplementedError"
    assert found["qnms_op"] == "NotImplementedError"
    assert found["nms"] == "RuntimeError"  # torchvision's own check that its extension was loaded


def test_no_triton_kernel_can_be_launched(found: dict[str, object]) -> None:
    assert found["triton_from"] == "_lab_sglang_platform_stubs"
    assert found["launch"] == "TypeError"
    assert found["sglang_launch"] == "TypeError"


def test_what_the_stub_does_for_metal_is_taken_back(found: dict[str, object]) -> None:
    assert found["tensor_to"] == found["tensor_copy"] == "method_descriptor"
    assert found["metal_added"] == []
    assert found["metal_available"] is False
    assert found["platform"] == "linux"


def test_a_spawned_child_has_the_shims_too(found: dict[str, object]) -> None:
    assert found["child"] == ["_lab_sglang_platform_stubs", "0.28.0+cu130"]
