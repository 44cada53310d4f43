"""Tensors that are made when they are asked for, so that a checkpoint larger than memory can be gone through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


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

    def watched(self, seen: Callable[[], object]) -> LazyTensors:
        """The same; `seen` is called whenever one of them has been made for the first time."""
        left = set(self.parts)

        def watch(name: str, part: LazyTensor) -> LazyTensor:
            def make() -> Tensor:
                tensor = part.make()
                if name in left:
                    left.remove(name)
                    seen()
                return tensor

            return LazyTensor(part.meta, make)

        return LazyTensors({name: watch(name, part) for name, part in self.parts.items()})
