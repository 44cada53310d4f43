"""The only code that imports megatron.core or torch.distributed."""

import logging
import os
import warnings
from pathlib import Path

from nemo_aligner.engine.lazy_compile import put_off_compiler

# or MKL, on some processors, sums in an order that depends on where in memory its operands lie; read at its first use
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# large tensors in large pages, where the system has them for who asks: with small ones, to find where a column goes on
# takes longer than to read it; torch looks when it makes its first tensor
try:
    _pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
except OSError:
    _pages = "[never]"  # no Linux, or one without them
if "[never]" not in _pages:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Megatron says at import which accelerator packages it did not find, and at every layer which arguments it will want
# some day; a user's own messages would drown in that
logging.getLogger("megatron").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"(megatron|torch)(\..*)?")

put_off_compiler()
