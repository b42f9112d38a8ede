"""For authors of adapters and for this package's own tests: conformance suites, tiny checkpoints; and a plugin.

from smolexport.testing.converters import ConverterTests      needs pytest
from smolexport.testing.runtimes import RuntimeTests          needs pytest
from smolexport.testing.checkpoints import write_checkpoint
smolexport.testing.pytest_plugin                              loaded by pytest itself: files of any project as tests
"""
