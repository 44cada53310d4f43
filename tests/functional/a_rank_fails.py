"""Two ranks: one ends, killed or by a fault, while the other waits for it: `python a_rank_fails.py kill|raise|stop`.

With `stop` it leaves before they have met, as one does whom a signal told to.
"""

import os
import signal
import sys
import time

from nemo_aligner.config.entry import one_line_errors
from nemo_aligner.config.schema import TrainerConfig
from nemo_aligner.engine.processes.launch import launch_local_ranks
from nemo_aligner.errors import StoppedEarly

with one_line_errors():
    trainer = TrainerConfig(devices=2, accelerator="cpu")
    launch_local_ranks(trainer)
    if sys.argv[1] == "stop" and os.environ["RANK"] == "1":
        raise StoppedEarly("SIGTERM")
    from nemo_aligner.engine.processes.cluster import start_cluster

    with start_cluster(trainer, tensor=1, pipeline=1) as cluster:
        cluster.barrier()
        if cluster.rank == 1:
            time.sleep(0.2)
            print(f"ends at {time.time()}", file=sys.stderr, flush=True)
            if sys.argv[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a layer too many")
        cluster.any(False)
