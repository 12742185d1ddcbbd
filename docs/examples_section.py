"""For the API page: the section ``Example:`` of a docstring holds doctests, which Griffe only expects under ``Examples:``."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class ExamplesSection(Extension):
    """Renames the section as the page is made; the sources stay as they are."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:\s*$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
