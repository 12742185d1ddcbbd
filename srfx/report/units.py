"""Numbers as people read them."""

from __future__ import annotations


def count(n: int) -> str:
    """1234567 as ``1.23 M``; below 10 000 all digits.

    Example:
        >>> count(9999), count(266610), count(4089184256)
        ('9999', '266.6 K', '4.09 G')
    """
    if abs(n) < 10_000:
        return str(n)
    value = float(n)
    for unit in ("", "K", "M", "G", "T"):
        if abs(value) < 999.95 or unit == "T":
            break
        value /= 1000
    digits = 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f} {unit}"


def size_text(n_bytes: int) -> str:
    """Bytes in decimal units.

    Example:
        >>> size_text(102228128)
        '102.2 MB'
    """
    text = count(n_bytes)
    return f"{text}B" if " " in text else f"{text} B"


def share(part: int, whole: int) -> str:
    """What is left, in percent.

    Example:
        >>> share(1, 3), share(0, 0)
        ('33.3 %', '-')
    """
    return f"{100 * part / whole:.1f} %" if whole else "-"


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as ``64x3x7x7``.

    Example:
        >>> shape_text((64, 3, 7, 7))
        '64x3x7x7'
    """
    return "x".join(str(n) for n in shape)
