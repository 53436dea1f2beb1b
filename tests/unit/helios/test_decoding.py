"""Types are described to msgspec under one lock: by nobody else, and whatever threads come first."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from helios.decoding import converted, from_json, from_msgpack, json_decoder, msgpack_decoder

ROOT = Path(__file__).parents[3]
TYPED = {"json.Decoder", "msgpack.Decoder", "json.decode", "msgpack.decode", "convert"}


class Inner(msgspec.Struct):
    a: int
    b: list[str] = []


class Outer(msgspec.Struct):
    inner: Inner
    many: dict[str, Inner] = {}


def test_what_is_decoded_is_checked() -> None:
    made = Outer(Inner(1, ["x"]), {"k": Inner(2)})
    assert from_json(msgspec.json.encode(made), Outer) == made
    assert from_msgpack(msgspec.msgpack.encode(made), Outer) == made
    assert converted(msgspec.to_builtins(made), Outer) == made
    assert converted({"inner": {"a": "7"}}, Outer, strict=False) == Outer(Inner(7))
    assert from_json(b"null", Outer | None) is None
    for wrong in (b'{"inner":{"a":"7"}}', b"{}", b"{"):
        with pytest.raises(msgspec.DecodeError):
            from_json(wrong, Outer)
    with pytest.raises(msgspec.ValidationError):
        converted({"inner": {"a": "7"}}, Outer)
    assert json_decoder(Outer) is json_decoder(Outer)
    assert msgpack_decoder(Outer) is msgpack_decoder(Outer)


RACE = """
import sys, threading, time
from helios.decoding import converted, from_json, from_msgpack
import msgspec

sys.setswitchinterval(1e-6)
FORM = '''
from __future__ import annotations
class A{0}(msgspec.Struct):
    a: int
    b: list[str] = []
class B{0}(msgspec.Struct):
    a: A{0} | None = None
    b: dict[str, A{0}] = {{}}
class C{0}(msgspec.Struct):
    a: A{0}
    b: B{0}
    c: int = 0
'''
TEXT = b'{"c":1,"b":{"b":{"x":{"a":1,"b":["c"]}},"a":{"a":1}},"a":{"a":1,"b":["q"]}}'
PLAIN = msgspec.json.decode(TEXT)
PACKED = msgspec.msgpack.encode(PLAIN)
end = time.monotonic() + 5
for number in range(1500):
    exec(FORM.format(number), globals())
    kind, part = globals()[f"C{number}"], globals()[f"B{number}"]
    ready = threading.Barrier(4)
    def run(call, *arguments):
        ready.wait()
        assert call(*arguments).b is not None
    threads = [
        threading.Thread(target=run, args=arguments)
        for arguments in ((from_json, TEXT, kind), (converted, PLAIN, kind), (from_msgpack, PACKED, kind),
                          (converted, PLAIN["b"], part))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if time.monotonic() > end:
        break
print("alive", number)
"""


def test_threads_that_meet_a_type_first_together() -> None:
    """With msgspec's own functions the process ends by SIGSEGV, mostly within a few hundred types."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", RACE], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("alive")


def test_nothing_else_has_msgspec_look_at_types() -> None:
    found = []
    for package in ("helios", "heliosfs", "registry", "router", "csi", "orchestrator"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == ROOT / "helios" / "decoding.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("msgspec"):
                    found += [
                        f"{path}: from {node.module}"
                        for name in node.names
                        if name.name in ("decode", "convert", "Decoder")
                    ]
                if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("msgspec.") in TYPED:
                    typed = len(node.args) > 1 or node.keywords or ast.unparse(node.func).endswith("Decoder")
                    if ast.unparse(node.func).startswith("msgspec.") and typed:
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
