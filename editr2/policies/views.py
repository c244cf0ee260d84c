"""A policy of several sizes as views of itself, one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from editr2.errors import DataError

Size = tuple[int, int]
P = TypeVar("P", bound="Views")


class Views:
    """`SizedPolicy`'s methods, of a policy that makes a view by `_view`. Call `_begin_views` once
    there are `sizes`."""

    image_size: Size
    module: Any
    sizes: Sequence[Size]
    _whole: Any
    _views: dict[Size, Any]

    def _begin_views(self) -> None:
        self._whole, self._views = None, {}

    def _view(self, size: Size) -> Any:
        """A shallow copy at another size, whose `_whole` is this."""
        raise NotImplementedError

    @property
    def whole(self: P) -> P:
        return self if self._whole is None else self._whole

    def at(self: P, size: Size) -> P:
        """As `SizedPolicy.at`: made once for the module there is."""
        whole = self.whole
        if size == whole.image_size:
            return whole
        if size not in self.sizes:
            raise DataError(
                f"images: {size[0]} x {size[1]} px (accepted: {', '.join(map(str, self.sizes))})"
            )
        found: P | None = whole._views.get(size)
        if found is None or found.module is not whole.module:
            found = whole._views[size] = whole._view(size)
        return found
