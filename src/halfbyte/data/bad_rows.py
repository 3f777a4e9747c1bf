"""What is said of rows that cannot be taken: all kinds at once, and the way out."""

from ..errors import DataError

KINDS_ALIKE = 3
"""More findings of one error are told as one kind."""


def refuse_bad(bad: list[DataError], total: int, skip_bad: int) -> None:
    """Raise DataError where there are more bad rows than may be left out: all kinds of them, how
    many there are, where the first ones stand, and the option that leaves exactly these out."""
    if len(bad) <= skip_bad:
        return
    first, skip = bad[0], f"--skip_bad {len(bad)} leaves out exactly these"
    if len(bad) == 1:
        ways = [way for way in first.ways_out if "--skip_bad" not in way]
        one = f"--skip_bad 1 leaves out this row, the only bad one of {total:,}"
        first.ways_out = (*ways, one) if total > 1 else tuple(ways)
        raise first
    kinds = _kinds_of(bad)
    most = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    lines = [
        f"{len(errors):,} x {what[:200]}: {', '.join(e.where for e in errors[:4])}"
        + (", ..." if len(errors) > 4 else "")
        for what, errors in most[:12]
    ]
    if len(most) > 12:
        lines.append(f"{len(most) - 12:,} more kinds")
    ways = [way for way in first.ways_out if "--skip_bad" not in way]
    if len(kinds) == 1:
        others = ", ".join(error.where for error in bad[1:6]) + (", ..." if len(bad) > 6 else "")
        raise DataError(
            f"{len(bad):,} of {total:,} rows: {first.what}",
            where=first.where,
            found=f"{first.found} (others: {others})".strip(),
            expected=first.expected,
            ways_out=[*ways, skip] if len(bad) < total else ways,
        )
    raise DataError(
        f"{len(bad):,} of {total:,} rows cannot be used",
        where=first.where,
        found="\n            ".join(lines),
        ways_out=["mend them", skip] if len(bad) < total else ["mend them"],
    )


def _kinds_of(bad: list[DataError]) -> dict[str, list[DataError]]:
    """Errors by what is said of them; where that quotes each row, by what is said of all."""
    whats: dict[str, dict[str, list[DataError]]] = {}
    for error in bad:
        whats.setdefault(error.what, {}).setdefault(error.found, []).append(error)
    kinds: dict[str, list[DataError]] = {}
    for what, by_found in whats.items():
        if len(by_found) > KINDS_ALIKE:
            first = next(iter(by_found))
            alike = [error for errors in by_found.values() for error in errors]
            kinds[f"{what} (such as {first})"] = alike
            continue
        for found, errors in by_found.items():
            kinds[what + (f" ({found})" if found else "")] = errors
    return kinds
