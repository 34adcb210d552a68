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
    names = _library.SCHEMAS if _library.EXTENSION_LOADED else ["dynamic_quantize"]
    for name in names:
        registered = getattr(torch.ops.flatquant, name).default._schema
        assert registered == torch._C.parse_schema(f"flatquant::{_library.SCHEMAS[name]}")


def test_no_argument_has_a_name_that_inductor_uses_itself() -> None:
    # Inductor calls FallbackKernel.create(cls, kernel, *args, **kwargs) with the arguments by name.
    arguments = torch._C.parse_schema(_library.SCHEMAS["dynamic_quantize"]).arguments
    assert not {argument.name for argument in arguments} & {"cls", "kernel"}
