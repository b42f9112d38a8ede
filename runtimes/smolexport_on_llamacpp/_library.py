"""The C library: loaded on demand, silenced, and its objects owned so that they are freed exactly once."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from smolexport.errors import FileFormatError, SessionClosedError
from smolexport.files import open_regular
from smolexport_on_llamacpp import importing_libraries

ERROR = 4  # of enum ggml_log_level; the bindings number it otherwise
LOADING = "error loading model: "
FUNCTION = re.compile(r"^(\w+: )+(?=\S)")

_errors: deque[str] = deque(maxlen=16)
_callbacks: list[Any] = []  # C keeps bare pointers to the callbacks, so they must never be collected
_loading: list[Path] = []  # the file that a failed assertion is about
_interruptions: list[BaseException] = []  # raised by a signal handler within _on_log


@cache
def library() -> Any:
    """The `llama_cpp` module, whose log no longer goes to stderr; raises MissingDependencyError."""
    with importing_libraries():
        import llama_cpp
    _callbacks.append(llama_cpp.llama_log_callback(_on_log))
    llama_cpp.llama_log_set(_callbacks[-1], ctypes.c_void_p(0))
    _replace_abort()
    llama_cpp.llama_backend_init()
    return llama_cpp


def _replace_abort() -> None:
    """One line instead of a debugger's back trace when llama.cpp ends the process.

    Some damaged files break its assertions; ggml then calls abort() whatever we do.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    try:
        from llama_cpp._ggml import libggml

        set_callback = libggml.ggml_set_abort_callback
    except (ImportError, AttributeError):  # another build, whose own message must do
        return
    _callbacks.append(kind(_on_abort))
    set_callback.argtypes, set_callback.restype = [kind], ctypes.c_void_p
    set_callback(_callbacks[-1])


def _on_abort(message: bytes) -> None:
    path = f"{_loading[-1]}: " if _loading else ""
    reason = re.sub(r"\S*[/\\]", "", message.decode("utf-8", "replace"))  # the builder's folders mean nothing here
    os.write(2, f"error: {path}llama.cpp gave up on this file and ended the process: {reason}\n".encode())
    os._exit(2)


def _on_log(level: int, text: bytes, _user_data: int | None) -> None:
    """Keep errors, drop the rest."""
    if level == ERROR:
        _errors.append(text.decode("utf-8", "replace").strip())


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a C function; call `raise_interruption` once its result has an owner.

    A signal handler may run within `_on_log`, even before its first statement.  What it raises cannot pass through
    C and would be printed and lost: it is kept instead.  Handlers run in the main thread only.
    """
    _interruptions.clear()
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    before = sys.unraisablehook

    def keep(lost: sys.UnraisableHookArgs) -> None:
        trace = lost.exc_traceback
        if lost.exc_value is not None and trace is not None and trace.tb_frame.f_code is _on_log.__code__:
            _interruptions.append(lost.exc_value)
        else:
            before(lost)

    sys.unraisablehook = keep
    try:
        return function(*arguments)
    finally:
        sys.unraisablehook = before


def raise_interruption() -> None:
    """Raise what a signal handler raised during the last `call`, if anything."""
    if _interruptions:
        error = _interruptions[0]
        _interruptions.clear()
        raise error


def last_errors() -> str:
    """The reason in llama.cpp's last error lines, in one line; clears them."""
    lines = [line for line in _errors if line]
    _errors.clear()
    # The last line only says that loading failed; its cause is a few lines before.
    causes = [line for line in lines if "failed to load model" not in line] or lines
    telling = [line for line in causes if LOADING in line] or causes
    return FUNCTION.sub("", telling[0]).replace(LOADING, "") if telling else "no reason given"


class Model:
    """A loaded model with one context.  Freed by `close`, when collected, or at exit, whichever comes first.

    `vocab_only` leaves the weights in the file.  Raises FileFormatError for what llama.cpp refuses.
    """

    def __init__(self, path: Path, gpu_layers: int, *, vocab_only: bool = False) -> None:
        self.path, self.lib = path, library()
        _check_magic(path)
        _errors.clear()
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = gpu_layers, vocab_only
        _loading.append(path)
        try:
            self._model = call(self.lib.llama_model_load_from_file, os.fsencode(path), params)
        finally:
            _loading.remove(path)
        if not self._model:
            raise_interruption()
            raise FileFormatError(f"{path}: llama.cpp cannot load this file: {last_errors()}")
        self._pointers = [self._model]
        self._free = weakref.finalize(self, _release, self.lib, self._pointers)
        raise_interruption()
        self.vocab = self.lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(self.lib.llama_vocab_n_tokens(self.vocab))
        self.trained_context = int(self.lib.llama_model_n_ctx_train(self._model))

    def make_context(self, params: Any) -> Any:
        """The pointer to a new llama_context, owned by this object; None when llama.cpp fails."""
        _errors.clear()
        context = call(self.lib.llama_init_from_model, self._model, params)
        if context:
            self._pointers.append(context)
        raise_interruption()
        return context

    def text(self, key: str) -> str | None:
        """The value of a metadata key as text; None if the file has no such key."""
        room = self.lib.llama_model_meta_val_str(self._model, key.encode(), None, 0) + 1
        if room < 1:
            return None
        buffer = ctypes.create_string_buffer(room)
        self.lib.llama_model_meta_val_str(self._model, key.encode(), buffer, room)
        return buffer.value.decode("utf-8", "replace")

    def check_open(self) -> None:
        """Raise SessionClosedError after `close`: every pointer is dangling then."""
        if not self._free.alive:
            raise SessionClosedError(f"{self.path}: the session is closed; open it again")

    def close(self) -> None:
        call(self._free)
        raise_interruption()


def _release(lib: Any, pointers: list[Any]) -> None:
    model, *contexts = pointers
    for context in contexts:
        lib.llama_free(context)
    lib.llama_model_free(model)


def _check_magic(path: Path) -> None:
    """Report the most common mistakes before llama.cpp sees the file."""
    try:
        with open_regular(path) as file:
            head = file.read(4)
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror}; give a GGUF file") from error
    if head != b"GGUF":
        raise FileFormatError(f"{path}: not a GGUF file: it starts with {head!r}")
