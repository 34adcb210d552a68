"""The operators' schemas: the same in C++, in Python and in the dispatcher."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

from flatquant import _library

TORCH_OPS = Path(__file__).parent.parent / "csrc" / "torch_ops.cpp"


def schemas_in_cpp(source: str) -> list[str]:
    """The string of every m.def("..." "..."), its pieces joined."""
    literal = r'"(?:[^"\\]|\\.)*"'
    calls = re.findall(rf"\bm\.def\(\s*((?:{literal}\s*)+)\)", source)
    return ["".join(ast.literal_eval(piece) for piece in re.findall(literal, c)) for c in calls]


def test_cpp_and_python_state_the_same_schemas() -> None:
    source = TORCH_OPS.read_text()
    found = schemas_in_cpp(source)
    assert len(found) == source.count("m.def(")
    assert sorted(found) == sorted(_library.SCHEMAS.values())


def test_each_schema_is_listed_under_its_operators_name() -> None:
    for name, schema in _library.SCHEMAS.items():
        assert torch._C.parse_schema(schema).name == name


def test_the_registered_schemas_are_the_stated_ones() -> None:
    only_compiled = {"kernel_names", "cuda_archs"}
    for name in _library.SCHEMAS:
        if name in only_compiled and not _library.EXTENSION_LOADED:
            continue
        registered = getattr(torch.ops.flatquant, name).default._schema
        assert registered == torch._C.parse_schema(f"flatquant::{_library.SCHEMAS[name]}")


def test_no_argument_has_a_name_that_inductor_uses_itself() -> None:
    # Inductor calls FallbackKernel.create(cls, kernel, *args, **kwargs) with the arguments by name.
    for schema in _library.SCHEMAS.values():
        arguments = torch._C.parse_schema(schema).arguments
        assert not {argument.name for argument in arguments} & {"cls", "kernel"}


def test_the_largest_number_of_outputs_is_the_kernels() -> None:
    source = (TORCH_OPS.parent / "problem.h").read_text()
    found = re.search(r"constexpr int max_outputs = (\d+);", source)
    assert found is not None and int(found[1]) == _library.MAX_OUTPUTS
