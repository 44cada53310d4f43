"""The only code that imports megatron.core or torch.distributed."""

import logging
import os
import warnings

from nemo_aligner.engine.lazy_compile import put_off_compiler

# or MKL, on some processors, sums in an order that depends on where in memory its operands lie; read at its first use
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# Megatron says at import which accelerator packages it did not find, and at every layer which arguments it will want
# some day; a user's own messages would drown in that
logging.getLogger("megatron").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"(megatron|torch)(\..*)?")

put_off_compiler()
