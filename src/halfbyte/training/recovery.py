"""A step that cannot run out of memory."""

from typing import TypeVar

Result = TypeVar("Result")
