"""Numbers and truth values of JSON documents, taken for what they are.

``"5"`` is no number, ``true`` no 1 and ``0`` no ``false``: whoever sends one meant something else,
and the description of the interface says so.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Strict

Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Real = Annotated[float, Strict()]  # 5 is one, too
Count = Annotated[Whole, Field(ge=0, lt=2**53)]  # what every JSON reader keeps exactly
