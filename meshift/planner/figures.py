"""Numbers as plans are told with them. It knows nothing of what they are of."""

from __future__ import annotations


def figure(value: float, digits: int = 3) -> str:
    """So many digits, and large numbers whole, not as powers of ten: `0.0457`, `9.15`, `111`, `9,184`."""
    return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:,.0f}"
