"""Tensors that are made when they are asked for, so that a checkpoint larger than memory can be gone through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from nemo_aligner.metrics import Progress


@dataclass(frozen=True)
class LazyTensor:
    """`make` makes it, anew every time; `meta` has its shape and dtype, on torch's meta device."""

    meta: Tensor
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is there."""
        return cls(tensor.to("meta"), lambda: tensor)


def lazily(function: Callable[..., Tensor], *parts: LazyTensor) -> LazyTensor:
    """`function(*parts)`, made when it is asked for; its shape and dtype, and shapes that do not fit, are known now."""
    return LazyTensor(function(*(part.meta for part in parts)), lambda: function(*(part.make() for part in parts)))


class LazyTensors(Mapping[str, Tensor]):
    """A mapping whose values are made at every look-up; `parts` describes them."""

    def __init__(self, parts: Mapping[str, LazyTensor]) -> None:
        self.parts = parts

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LazyTensors:
        """`tensors` themselves where they are lazy already."""
        if isinstance(tensors, LazyTensors):
            return tensors
        return cls({name: LazyTensor.of(tensor) for name, tensor in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @contextmanager
    def counted(self, name: str, *, show: bool) -> Iterator[LazyTensors]:
        """The same, while those that have been made are counted; Progress calls it `name`."""
        left = set(self.parts)

        def watched(tensor: str, part: LazyTensor) -> LazyTensor:
            def make() -> Tensor:
                made = part.make()
                if tensor in left:  # some are made more than once
                    left.remove(tensor)
                    progress.advance(1)
                return made

            return LazyTensor(part.meta, make)

        with Progress(name, len(left), show=show, unit="tensor") as progress:
            yield LazyTensors({tensor: watched(tensor, part) for tensor, part in self.parts.items()})
