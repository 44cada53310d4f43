"""A command as it is, and the tokens of the prompts that it draws from: `python noting_prompts.py NOTES SCRIPT ...`."""

import json
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_aligner.engine.interfaces import GenerationRequest
from nemo_aligner.engine.policy import MegatronPolicy

notes = Path(sys.argv[1])
generate = MegatronPolicy.generate


def noting(self: Any, requests: Iterable[GenerationRequest], *how: Any) -> Iterator[Any]:
    requests = list(requests)
    with notes.open("a") as stream:
        stream.writelines(json.dumps(request.prompt_tokens) + "\n" for request in requests)
    return generate(self, requests, *how)


MegatronPolicy.generate = noting  # type: ignore[method-assign]
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
