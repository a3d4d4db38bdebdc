"""Triton's names, importable where Triton is missing: kernels are then defined as something that must not be launched."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias


class _Missing:
    """Stands for anything of Triton's: decorators, types, constants."""

    def __getattr__(self, name: str) -> _Missing:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Missing:
        return self


triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Missing()

jit: Any = triton.jit
if TYPE_CHECKING:
    constexpr: TypeAlias = Any
else:
    constexpr = tl.constexpr


def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    try:
        return find_spec("triton") is not None
    except ValueError:  # an entry of None in sys.modules
        return False


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set before Triton was first imported."""
    return not isinstance(triton, _Missing) and bool(triton.knobs.runtime.interpret)
