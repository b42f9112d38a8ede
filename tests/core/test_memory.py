"""Memory that is given back is no longer counted, and nothing that is still needed goes with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import environment

LOADED = """
import llvmlite.binding as llvm
from smolexport.heap import give_back_heap, give_back_library, share_heap

def resident():
    text = open("/proc/self/status").read()
    return int(text.split("RssFile:")[1].split()[0])

def compiles():
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    return "ret" in machine.emit_assembly(llvm.parse_assembly("define i32 @f() { ret i32 7 }"))

before = resident()
give_back_library("libllvm")
print(resident() - before)
give_back_library("libllvmlite")
print(resident() - before)
share_heap()
give_back_heap()
print(compiles())
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is mapped")
def test_the_pages_of_a_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        check=True, capture_output=True, text=True, env=environment(), timeout=60,
    )  # fmt: skip
    another, its_own, works = done.stdout.split()
    assert abs(int(another)) < 2048, "a library of another name"
    assert int(its_own) < -16384
    assert works == "True"
