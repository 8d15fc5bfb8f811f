"""Names to classes. A new quantizer, network or modality is one new file in its package; nothing else is edited."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name, from all modules of one package, which are imported at the first question."""

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises ValueError if another class has taken the name."""

        def add(cls: type[T]) -> type[T]:
            taken = self._classes.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is already {taken.__qualname__} of {taken.__module__}")
            self._classes[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class of that name. Raises ValueError that lists the names there are."""
        if name not in self.names():
            near = difflib.get_close_matches(str(name), self.names(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}; {hint}There are: {', '.join(self.names())}")
        return self._classes[name]
