"""Which token ids are codes, conditions, and begin, end and pad tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one packed dataset. Raises ValueError if an id has two meanings, or is below 0.

    conditions: empty if their number is not known. bos and eos may be equal. pad may be any id, because `documents`
    says where padding is; but with pad_in_documents, which the order delayed needs, it must be an id of its own.
    """

    codes: range
    conditions: range
    bos: int | None
    eos: int | None
    pad: int | None
    pad_in_documents: bool

    def __post_init__(self) -> None:
        if min(self.codes.start, self.conditions.start) < 0:
            raise ValueError(
                f"offset is {self.codes.start}, condition_offset {self.conditions.start}; they must be 0 or more"
            )
        if overlap(self.codes, self.conditions):
            raise ValueError(
                f"the conditions have the ids {ids(self.conditions)}, and the codes {ids(self.codes)}; choose a "
                f"condition_offset of {self.codes.stop} or more, or raise offset"
            )
        if self.pad is not None and self.pad < 0:
            raise ValueError(f"pad is {self.pad}; it must be 0 or more")
        for name, token in self.specials.items():
            self._check_special(name, token)
        if self.pad_in_documents and self.pad in (self.bos, self.eos):
            raise ValueError(f"pad is {self.pad}, like bos or eos; the order delayed needs an id of its own for it")

    @property
    def specials(self) -> dict[str, int]:
        """The begin, end and pad tokens that documents contain."""
        named = {"bos": self.bos, "eos": self.eos, "pad": self.pad if self.pad_in_documents else None}
        return {name: token for name, token in named.items() if token is not None}

    @property
    def size(self) -> int:
        """One more than the largest known id."""
        return max([self.codes.stop, *self._ends()])

    def _ends(self) -> list[int]:
        special = [1 + token for token in (self.bos, self.eos, self.pad) if token is not None]
        return [*special, *([self.conditions.stop] if self.conditions else [])]

    def _check_special(self, name: str, token: int) -> None:
        if token < 0 or token in self.codes or token in self.conditions:
            others = f" or of the conditions, {ids(self.conditions)}" if self.conditions else ""
            free = max(self.codes.stop, self.conditions.stop if self.conditions else 0)
            raise ValueError(
                f"{name} is {token}; it must be 0 or more and not one of the codes, {ids(self.codes)}{others}; choose "
                f"{free} or more, or raise offset"
            )

    def check_condition(self, token: int, key: str, *, is_class: bool) -> None:
        """Raises ValueError unless the condition of a row may hold this id. Only text may contain bos and eos."""
        if self.conditions and token not in self.conditions and (is_class or token not in self.specials.values()):
            raise ValueError(
                f"the condition of row {key} is {token}; it must be in {ids(self.conditions)}, which condition_offset "
                "and condition_size say; correct it, or raise condition_size"
            )
        if token < 0 or token in self.codes or (is_class and token in self.specials.values()):
            raise ValueError(
                f"the condition of row {key} is {token}; it must be 0 or more and not one of the codes, "
                f"{ids(self.codes)}, or a special token, {self.specials}; choose another condition_offset, or raise "
                "offset"
            )


def overlap(first: range, second: range) -> bool:
    return bool(range(max(first.start, second.start), min(first.stop, second.stop)))


def ids(those: range) -> str:
    return f"{those.start}..{those.stop - 1}"
