"""Files that are damaged, foreign, newer or hostile; writes that are cut off; models whose code is not in the file."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

import srfx
from srfx.errors import (
    DamagedFileError,
    FileError,
    MissingArchitectureError,
    NewerFileError,
    SrfxError,
    UnsavableError,
)
from srfx.files import container, names
from tests.helpers import masked, randomized

ROOT = Path(__file__).parents[3]
X = torch.randn(2, 3)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    small = srfx.minimize(masked(randomized(network()), rows=0.3), X)
    srfx.save(small, tmp_path / "net.srfx")
    return tmp_path / "net.srfx"


def rewritten(path: Path, change: Any) -> Path:
    """The file with its document changed by ``change`` and all checksums right, as somebody who means harm would."""
    document, _ = container.read(path)
    with safe_open(path, "pt") as opened:
        known = set(opened.keys()) - {container.DOCUMENT}
        stored = {name: opened.get_tensor(name).clone() for name in sorted(known)}
    change(document)
    container.write(path, document, stored.items())
    return path


def nodes(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {node["name"]: node for node in document["module"]["graph"]["nodes"]}


# ---------------------------------------------------------------------- what a file looks like
def test_other_tools_can_read_the_weights(file: Path) -> None:
    small = srfx.load(file)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {*small.state_dict(), "__srfx__"} - {"1._extra_state"}
        for name, parameter in (*small.named_parameters(), *small.named_buffers()):
            assert torch.equal(opened.get_tensor(name), parameter)
        assert opened.metadata()["srfx"] == "1"
        document = json.loads(bytes(opened.get_tensor("__srfx__").tolist()))
    assert document["torch"] == torch.__version__
    assert document["record"]["plan"]["version"] == 1


def test_equal_models_give_equal_files(file: Path, tmp_path: Path) -> None:
    srfx.save(srfx.load(file), tmp_path / "again.srfx")
    assert (tmp_path / "again.srfx").read_bytes() == file.read_bytes()


def test_tensors_do_not_hang_on_the_file(file: Path) -> None:
    small = srfx.load(file)
    wanted = small(X)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(small(X), wanted)


def test_no_numpy_is_needed(file: Path) -> None:
    code = (
        "import sys; sys.modules['numpy'] = None; import torch, srfx; "
        "m = srfx.load(sys.argv[1]); srfx.save(m, sys.argv[1]); print(m(torch.ones(1, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr


# ---------------------------------------------------------------------- damage
def test_every_cut_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, 900, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(FileError, match=str(file)):
            srfx.load(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(DamagedFileError):
        srfx.load(file)


def test_every_flipped_bit_is_noticed_or_harmless(file: Path) -> None:
    """Harmless are bits of the header that say nothing (spaces, the word pt)."""
    whole, rng = file.read_bytes(), random.Random(0)
    wanted = srfx.load(file)(X)
    header_end = 8 + int.from_bytes(whole[:8], "little")
    places = [*rng.sample(range(header_end), 150), *rng.sample(range(header_end, len(whole)), 150)]
    n_harmless = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            found = srfx.load(file)
        except FileError:
            continue
        assert place < header_end
        n_harmless += 1
        assert torch.equal(found(X), wanted)
    assert n_harmless < 10


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        srfx.load(path)
    with pytest.raises(FileError, match="folder"):
        srfx.load(tmp_path)
    torch.save(network().state_dict(), path)
    with pytest.raises(FileError, match="zip archive"):
        srfx.load(path)
    path.write_text("hello, this is text and no file of ours")
    with pytest.raises(FileError, match="no safetensors file"):
        srfx.load(path)
    save_file(network().state_dict(), path)
    with pytest.raises(FileError, match=r"not one of srfx\.save"):
        srfx.load(path)


def test_a_newer_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "VERSION", 7)
    container.write(file, {}, [])
    monkeypatch.undo()
    with pytest.raises(NewerFileError, match="form 7, this srfx reads up to 1"):
        srfx.load(file)


@pytest.mark.parametrize("key", ["version", "torch", "module", "record", "tensors"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [[1]], {"class": "x"}])
def test_a_document_of_another_form(file: Path, key: str, value: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        document[key] = value

    rewritten(file, change)
    if key in ("version", "torch") or (key, value) == ("record", None):
        assert srfx.load(file)(X).shape == (2, 2)  # nothing depends on it
    else:
        with pytest.raises(SrfxError):
            srfx.load(file)


# ---------------------------------------------------------------------- hostile files
HOSTILE = [
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.open", "torch.load",
    "torch.save", "torch.from_file", "torch.hub.load", "torch.ops.load_library", "operator.attrgetter", "operator.call",
    "operator.methodcaller", "aten::from_file", "aten::save", "prim::Print.", "aten::__class__.x", "subprocess.run",
    "torch.jit.load", "torch.nn.functional.torch", "torch.nn.functional.importlib", "srfx.load", "torch.Tensor.apply_",
    "torch.Tensor.__reduce_ex__", "torch.compile",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_functions_that_a_file_may_not_name(file: Path, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        node = next(n for n in nodes(document).values() if n["op"] == "call_module")
        node |= {"op": "call_function", "target": name, "args": ["echo hello"]}

    if name == "torch.Tensor.apply_":
        assert name in names.functions()  # computes, on callables that no file can give it
        return
    with pytest.raises(FileError, match="may not name"):
        srfx.load(rewritten(file, change))


@pytest.mark.parametrize(
    "target", ["__class__", "__reduce_ex__", "__getattribute__", "__setattr__", "system", "_view_func"]
)
def test_methods_that_a_file_may_not_name(file: Path, target: str) -> None:
    def change(document: dict[str, Any]) -> None:
        node = next(n for n in nodes(document).values() if n["op"] == "call_module")
        node |= {"op": "call_method", "target": target}

    with pytest.raises(FileError, match="may not name the method"):
        srfx.load(rewritten(file, change))


@pytest.mark.parametrize("target", ["x=print", "x:os.environ", "x;import this", "x, y", ""])
def test_inputs_are_identifiers(file: Path, target: str) -> None:
    """Their names stand as they are in the code that fx generates."""

    def change(document: dict[str, Any]) -> None:
        first = document["module"]["graph"]["nodes"][0]
        assert first["op"] == "placeholder"
        first["target"] = target

    with pytest.raises(DamagedFileError, match="identifier"):
        srfx.load(rewritten(file, change))


def test_attributes_that_a_file_may_not_ask_for(file: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        node = next(n for n in nodes(document).values() if n["op"] == "call_module")
        node |= {"op": "call_function", "target": "builtins.getattr", "args": [node["args"][0], "__class__"]}

    with pytest.raises(FileError, match="may not ask for the attribute"):
        srfx.load(rewritten(file, change))


@pytest.mark.parametrize(
    "name", ["subprocess.Popen", "torch.nn.modules.module.os", "collections.OrderedDict", "srfx.cli.X"]
)
def test_classes_that_a_file_may_not_name(file: Path, name: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["module"]["children"]["0"]["class"] = name

    with pytest.raises(FileError, match="may not name the class"):
        srfx.load(rewritten(file, change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["module"].__setitem__("name", "x\nimport os"), "should be an identifier"),
        (lambda d: d["module"]["children"]["0"]["state"].__setitem__("_forward_hooks", {"dict": []}),
         "0 sets ['_forward_hooks']"),
        (lambda d: d["module"]["children"]["0"]["state"].__setitem__("__class__", 1),
         "'__class__' is no name of an attribute"),
        (lambda d: d["module"]["children"]["0"]["state"].__setitem__("in_features", {"unheard": 1}),
         "a value of kind 'unheard' is unknown here"),
        (lambda d: d["module"]["children"]["0"]["state"].__setitem__("in_features", {"a": 1, "b": 2}),
         "expected one key, got ['a', 'b']"),
        (lambda d: d["module"]["children"]["0"]["state"].__setitem__("in_features", {"torch": "load"}),
         "no dtype, layout or memory format 'load'"),
        (lambda d: d["module"]["children"]["0"]["parameters"].__setitem__("weight", "no.such"),
         "no tensor 'no.such' is listed"),
        (lambda d: d["tensors"]["0.weight"].__setitem__("shape", [1, 1]), "'0.weight' is [6, 3], should be [1, 1]"),
        (lambda d: d["tensors"]["0.weight"].__setitem__("stride", [0, 0]), "'0.weight' is [6, 3], should be [1, 1]"),
        (lambda d: d["tensors"]["0.weight"].__setitem__("dtype", "float64"),
         "'0.weight' is float32 in the file, listed as float64"),
        (lambda d: d["tensors"]["0.weight"].__setitem__("dtype", "load"), "'0.weight' has dtype 'load'"),
        (lambda d: d["tensors"]["0.weight"].__setitem__("parameter", False), "weight is listed among the parameters"),
        (lambda d: d["tensors"]["0.weight"].__setitem__("device", "cuda:77"),
         "cannot be made (Torch not compiled with CUDA enabled); load(..., device='cpu')?"),
        (lambda d: d["tensors"]["0.weight"].__setitem__("stored", "__srfx__"),
         "net.srfx is damaged: the bytes of '__srfx__'"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("name", "a b"), "'a b' should be an identifier"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("name", "import"),
         "a node reads '_0' before it is computed"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("target", 'x"); import os; ("'), "_0 has the target"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("target", "0.__class__"),
         "_0 has the target '0.__class__'"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("target", "nowhere"), "no attribute 'nowhere'"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("kwargs", {"x=1, y": 1}),
         "'x=1, y' should be an identifier"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("args", [{"node": "output"}]),
         "a node reads 'output' before it is computed"),
        (lambda d: d["module"]["graph"]["nodes"].pop(0), "a node reads 'input_1' before it is computed"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("op", "call_nobody"), "'call_nobody' no kind of node"),
        (lambda d: d["module"]["graph"]["nodes"][1].__setitem__("target", 5), "_0 has the target 5"),
        (lambda d: d["module"]["graph"]["nodes"][2].__setitem__("name", d["module"]["graph"]["nodes"][1]["name"]),
         "'_0' is no new node"),
        (lambda d: d.__setitem__("module", d["module"]["children"]["0"]), "its root is no graph"),
        (lambda d: d["record"].__setitem__("more", 1), "unexpected keyword argument 'more'"),
        (lambda d: d["record"]["plan"].__setitem__("version", 9), "expected a plan of version 1, got version 9"),
    ],
)  # fmt: skip
def test_nonsense(file: Path, change: Any, said: str) -> None:
    """What is wrong and where, with the file's path once."""
    if "CUDA" in said and torch.cuda.is_available():
        said = "cannot be made"
    with pytest.raises(FileError, match=re.escape(said)) as raised:
        srfx.load(rewritten(file, change))
    assert str(raised.value).count(str(file)) == 1


def test_a_tensor_that_cannot_be_read(file: Path) -> None:
    """A dtype that the format knows and torch does not."""
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + length])
    head["0.weight"].update(
        dtype="F4", shape=[2 * 4 * n for n in head["0.weight"]["shape"][:1]] + head["0.weight"]["shape"][1:]
    )
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(DamagedFileError, match=r"net\.srfx is damaged: '0\.weight' cannot be read"):
        srfx.load(file)


# ---------------------------------------------------------------------- writing
WRITER = """
import glob, os, signal, sys, torch, srfx
from srfx.files import container
small = srfx.load(sys.argv[1])
n = 0
real = container._bytes
def dying(tensor):
    global n
    n += bool(glob.glob(os.path.dirname(sys.argv[1]) + "/.*.part"))
    if n == 3:                      # in the midst of the tensors
        os.kill(os.getpid(), signal.SIGKILL)
    return real(tensor)
container._bytes = dying
srfx.save(small, sys.argv[1])
"""


def test_a_killed_writer_leaves_the_old_file(file: Path) -> None:
    whole = file.read_bytes()
    done = subprocess.run([sys.executable, "-c", WRITER, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert file.read_bytes() == whole
    assert [p.suffix for p in file.parent.iterdir() if p != file] == [".part"]  # it had begun


def test_a_failing_write_leaves_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, small = file.read_bytes(), srfx.load(file)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        srfx.save(small, file)
    assert file.read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(FileNotFoundError):
        srfx.save(small, file.parent / "nowhere" / "x.srfx")


def test_the_file_is_readable_by_others_as_usual(file: Path) -> None:
    usual = file.with_name("usual")
    usual.write_text("x")
    assert file.stat().st_mode == usual.stat().st_mode


# ---------------------------------------------------------------------- code of the original
@fx.wrap
def halved(x: Tensor) -> Tensor:
    return x * 0.5


class Own(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.scale = 3.0
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


class Foreign(nn.Module):
    """Not what the file was made from."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Special(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.own, self.last = nn.Linear(3, width), Own(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(halved(self.own(F.relu(self.first(x)))))


class KeepsOwn(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, (Own, Foreign)) or super().is_leaf_module(m, name)


def traced(net: nn.Module) -> fx.GraphModule:
    tracer = KeepsOwn()
    return fx.GraphModule(net, tracer.trace(net))


def test_wrapped_functions_come_from_the_original(tmp_path: Path) -> None:
    path = tmp_path / "x.srfx"
    small = srfx.minimize(masked(randomized(Special())), X)
    srfx.save(small, path)
    with pytest.raises(
        MissingArchitectureError, match=r"halved calls .*halved.*pass it to srfx.load as model"
    ):
        srfx.load(path)
    for model in (Special(), Special, functools.partial(Special, 8), lambda: fx.symbolic_trace(Special())):
        back = srfx.load(path, model)
        assert torch.equal(back(X), small(X))
        assert srfx.plan(back) == srfx.plan(small)
    with pytest.raises(FileError, match="which the given model does not"):
        srfx.load(path, nn.Linear(3, 2))


def test_own_modules_and_hooks_come_from_the_original(tmp_path: Path) -> None:
    path = tmp_path / "x.srfx"
    net = masked(randomized(Special()))
    net.last.register_forward_hook(lambda module, args, out: out + 1)
    small = srfx.minimize(traced(net), X)
    srfx.save(small, path)
    with pytest.raises(MissingArchitectureError, match=r"own is a .*Own, whose code is not in the file"):
        srfx.load(path)
    fresh = Special()
    fresh.last.register_forward_hook(lambda module, args, out: out + 1)
    back = srfx.load(path, lambda: traced(fresh))
    assert torch.equal(back(X), small(X))
    assert back.own is not fresh.own
    assert back.own.inner.weight is not fresh.own.inner.weight
    fresh.own = nn.Sequential()  # torch.fx traces into it, so that no module is there
    with pytest.raises(FileError, match=r"has no module 'own', which is a .*Own.*: is it the original\?"):
        srfx.load(path, lambda: traced(fresh))
    other = Special()
    other.own = Foreign()
    with pytest.raises(FileError, match=r"own is a .*Own in the file, in model a .*Foreign"):
        srfx.load(path, lambda: traced(other))


def test_hooks_alone_need_the_original(tmp_path: Path) -> None:
    net = masked(randomized(network()))
    net[3].register_forward_hook(lambda module, args, out: out * 2)
    small = srfx.minimize(net, X)
    srfx.save(small, tmp_path / "x.srfx")
    with pytest.raises(MissingArchitectureError, match="3 has forward hooks"):
        srfx.load(tmp_path / "x.srfx")
    assert torch.equal(srfx.load(tmp_path / "x.srfx", net)(X), small(X))


def test_the_original_has_to_fit(file: Path) -> None:
    assert srfx.load(file, network) is not None
    wider = nn.Sequential(nn.Linear(3, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(
        FileError, match=r"not the one .*0\.weight is \[9, 3\], the file was made for \[8, 3\]"
    ):
        srfx.load(file, wider)
    with pytest.raises(FileError, match=r"3\.weight is missing"):
        srfx.load(file, nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU()))
    with pytest.raises(FileError, match=r"4\.weight is unknown to the file"):
        srfx.load(file, nn.Sequential(*network(), nn.Linear(2, 2)))
    with pytest.raises(FileError, match=r"net\.srfx: model has to be an nn\.Module"):
        srfx.load(file, lambda: 3)  # type: ignore[arg-type, return-value]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsavableError, match=r"fx\.GraphModule"):
        srfx.save(network(), tmp_path / "x")
    small = srfx.minimize(network().eval(), X)
    small.get_submodule("0").note = object()
    with pytest.raises(UnsavableError, match=r"the module 0 .*object"):
        srfx.save(small, tmp_path / "x")
    del small.get_submodule("0").note
    weight = small.get_submodule("0").weight
    small.get_submodule("0").weight = nn.Parameter(weight.detach().to_sparse())
    with pytest.raises(
        UnsavableError, match=r"0\.weight is torch\.sparse_coo, quantized False; only dense ones"
    ):
        srfx.save(small, tmp_path / "x")
    small.get_submodule("0").weight = weight
    small.to("meta")
    with pytest.raises(UnsavableError, match="no values"):
        srfx.save(small, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_device(file: Path) -> None:
    assert {p.device.type for p in srfx.load(file, device="meta").parameters()} == {"meta"}
    with torch.device("meta"):
        assert {p.device.type for p in srfx.load(file).parameters()} == {"cpu"}


def test_it_is_quick(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 2048)).eval()
    small = srfx.minimize(wide, torch.randn(1, 2048))
    begin = time.perf_counter()
    srfx.save(small, tmp_path / "x")
    srfx.load(tmp_path / "x")
    assert time.perf_counter() - begin < 5  # 34 MB; about 0.2 s on an idle machine
