"""`dataclass` as in the standard library, whose methods are written when somebody first needs them.

`dataclasses` writes and compiles up to six methods for every class, which takes half a millisecond. A command imports some 190 classes and
makes objects of a third of them. One of this decorator has placeholders, and becomes an ordinary dataclass when one of them is called, or
when its fields are asked for.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]

FIELDS, SIGNATURE = "__dataclass_fields__", "__signature__"
WRITTEN = ("__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__")
"""What `dataclasses` writes. Any may be the first that is called: an object that was unpickled has not called `__init__`."""

_lock = threading.RLock()


class FieldsToCome:
    """Stands for the fields of a class that is not written yet: whoever asks for them, as subclasses do, has it written."""

    def __init__(self, cls: type, options: dict[str, Any]) -> None:
        self._cls, self._options = cls, options
        self._placeholders = [name for name in WRITTEN if name not in cls.__dict__]
        for name in self._placeholders:
            setattr(cls, name, self._placeholder(name))
        self._placeholders.append(SIGNATURE)
        setattr(cls, SIGNATURE, SignatureToCome(self))

    def __get__(self, _: object, owner: type) -> Any:
        self.write()
        return getattr(owner, FIELDS)

    def write(self) -> None:
        """Make it an ordinary dataclass, once, whichever thread asks first."""
        with _lock:
            if self._cls.__dict__.get(FIELDS) is self:
                for name in (*self._placeholders, FIELDS):
                    delattr(self._cls, name)
                dataclasses.dataclass(**self._options)(self._cls)

    def _placeholder(self, name: str) -> Any:
        def write_and_call(instance: object, *values: object, **named: object) -> Any:
            self.write()
            return getattr(self._cls, name)(instance, *values, **named)

        return write_and_call


class SignatureToCome:
    """Stands for the signature of such a class, for help pages."""

    def __init__(self, fields: FieldsToCome) -> None:
        self._fields = fields

    def __get__(self, _: object, owner: type) -> Any:
        import inspect

        self._fields.write()
        return inspect.signature(owner)


if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls=None, /, **options):
        """As `dataclasses.dataclass`; at once where `slots` are asked for, which need another class."""

        def decorate(cls):
            if options.get("slots"):
                return dataclasses.dataclass(**options)(cls)
            setattr(cls, FIELDS, FieldsToCome(cls, options))
            return cls

        return decorate if cls is None else decorate(cls)
