"""Machine code as an image: linked once, it runs at whatever address it is loaded, and needs no LLVM for it."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest
from octavo_kernels.cpu.image import Image, Loaded, link

llvm = pytest.importorskip("llvmlite.binding")
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="links code for x86-64")

SOURCE = """
@table = internal constant [4 x double] [double 1.5, double 2.5, double 3.5, double 4.5]
@words = internal constant [6 x i8] c"octavo"
declare i64 @strnlen(i8*, i64)

define internal double @look_up(i64 %at) noinline {
  %place = getelementptr [4 x double], [4 x double]* @table, i64 0, i64 %at
  %value = load double, double* %place
  ret double %value
}

define double @halved(i64 %at) {
  %value = call double @look_up(i64 %at)
  %half = fmul double %value, 0.5
  ret double %half
}

define i64 @length(i64 %most) {
  %place = getelementptr [6 x i8], [6 x i8]* @words, i64 0, i64 0
  %count = call i64 @strnlen(i8* %place, i64 %most)
  ret i64 %count
}
"""


def compiled(source: str, **settings: str) -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(**settings)
    code: bytes = machine.emit_object(llvm.parse_assembly(source))
    return code


def check(loaded: Loaded) -> None:
    halved = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_int64)(loaded.address("halved"))
    assert [halved(at) for at in range(4)] == [0.75, 1.25, 1.75, 2.25]
    length = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(loaded.address("length"))
    assert (length(3), length(6)) == (3, 6)


def test_an_image_runs_wherever_it_is_put() -> None:
    image = link(compiled(SOURCE, reloc="pic", codemodel="small"))
    assert set(image.symbols) == {"halved", "length"}
    assert set(image.imports) == {"strnlen"}
    again = Image.from_bytes(image.to_bytes())
    assert again == image
    first, second = Loaded(image), Loaded(again)
    assert first.address("halved") != second.address("halved")
    check(first)
    del first
    check(second)
    with pytest.raises(KeyError):
        second.address("look_up")


def test_code_that_must_lie_at_one_place_is_refused() -> None:
    with pytest.raises(ValueError, match="depends on where the code lies"):
        link(compiled(SOURCE, reloc="static", codemodel="large"))


def test_the_default_model_runs_without_llvm_once_it_is_compiled() -> None:
    program = "import sys; from octavo import LLM; llm = LLM(); llm.generate('Hello'); "
    program += "print(llm.engine.limits.packed, 'llvmlite.binding' in sys.modules)"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packed, loaded = done.stdout.split()
    if packed == "False":
        pytest.skip("no kernels for this processor")
    assert loaded == "False"
