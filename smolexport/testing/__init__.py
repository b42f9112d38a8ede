"""For authors of adapters and for this package's own tests: conformance suites and tiny checkpoints.

from smolexport.testing.converters import ConverterTests      needs pytest
from smolexport.testing.runtimes import RuntimeTests          needs pytest
from smolexport.testing.checkpoints import write_checkpoint
"""
