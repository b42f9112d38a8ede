"""Chat templates of strangers, rendered where they can do no harm.

A chat template is a stranger's program in Jinja.  The libraries run it in a sandbox, which holds off neither the
endless nor the enormous.  So templates run in a process of their own, which has a clock and a limit of memory; nothing
else in smolexport calls `Chat.render`.

| file | what it holds |
|---|---|
| `renderer.py` | this side: starts the process, asks, and ends it |
| `child.py` | the process: opens a runtime's tokenizer and template, and answers line by line |
"""

from __future__ import annotations

from smolexport.run.rendering.renderer import Answer, Renderer

__all__ = ["Answer", "Renderer"]
