"""The calling convention of an exported graph (nested inputs and outputs) as JSON and back."""

from __future__ import annotations

from typing import Any

from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from srfx.errors import DamagedFileError, FileError, UnsavableError
from srfx.files import names
from srfx.files.values import Decoder, Encoder


def codegen_data(codegen: CodeGen) -> dict[str, Any] | None:
    """None for plain inputs and outputs.

    Raises:
        UnsavableError: a convention of another tool.
    """
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise UnsavableError(
            f"the graph generates its code by {names.class_name(type(codegen))}, which has no form here"
        )
    info = codegen.pytree_info
    arguments = [name.split(":")[0].strip() for name in info.orig_args]
    out = None if info.out_spec is None else spec_data(info.out_spec, "the outputs")
    return {"arguments": arguments, "in": spec_data(info.in_spec, "the inputs"), "out": out}


def codegen_of(data: dict[str, Any] | None) -> CodeGen:
    """The inverse of `codegen_data`."""
    if data is None:
        return CodeGen()
    arguments = [identifier(name) for name in data["arguments"]]
    out = None if data["out"] is None else spec_of(data["out"], "the outputs")
    return _PyTreeCodeGen(_PyTreeInfo(arguments, spec_of(data["in"], "the inputs"), out))


def identifier(name: Any) -> str:
    """The name, which becomes part of generated code.

    Raises:
        DamagedFileError: it is no identifier.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise DamagedFileError(f"the file is damaged: {name!r} should be an identifier")
    return name


def spec_data(spec: pytree.TreeSpec, where: str) -> Any:
    """A tree of containers: ``*`` is a leaf, else class, context and children.

    Raises:
        UnsavableError: a container whose context is no plain data.
    """
    if spec.is_leaf():
        return "*"
    name = names.class_name(spec.type)
    context = Encoder(f"{where} ({name})")(spec.context)
    return [name, context, [spec_data(spec.child(i), where) for i in range(spec.num_children)]]


def spec_of(data: Any, where: str) -> pytree.TreeSpec:
    """The inverse of `spec_data`.

    Raises:
        FileError: a class that is not known in this process.
    """
    if data == "*":
        return pytree.tree_structure(0)
    name, context, children = data
    cls = names.container_class(name)
    if cls is None:
        module = name.rpartition(".")[0]
        raise FileError(
            f"{where} are of class {name}, which is unknown here: import {module} first, or pass model"
        )
    return pytree.TreeSpec(cls, Decoder(where)(context), [spec_of(child, where) for child in children])
