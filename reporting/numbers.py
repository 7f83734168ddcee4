"""Numbers as a reader wants them: shares in percent, tokens in millions, seconds in minutes."""

import math

UNITS_OF_TIME = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days"))


def number(value: float, digits: int = 4) -> str:
    """At most `digits` significant digits, thousands separated; "—" for NaN."""
    if not math.isfinite(value):
        return "—"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e7:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{value:.{digits - 1}e}"
        mantissa, exponent = text.split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text


def fixed(value: float, decimals: int) -> str:
    """A fixed count of decimals, so that columns line up; "—" for NaN."""
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "—"


def percent(value: float, decimals: int = 1) -> str:
    """A share as percent."""
    return f"{fixed(100 * value, decimals)} %" if math.isfinite(value) else "—"


def compact(value: float, digits: int = 3) -> str:
    """1536000 → "1.54 M"."""
    if not math.isfinite(value):
        return "—"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 0.5 * 10**-digits):
            return f"{number(value / size, digits)} {letter}"
    return number(value, digits)


def duration(seconds: float) -> str:
    """192 → "3 min 12 s"."""
    if not math.isfinite(seconds):
        return "—"
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def with_unit(value: float, unit: str) -> str:
    """A value of a metric in words, such as "1.503 nats" or "53.4 %"."""
    return percent(value) if unit == "%" else f"{number(value)} {unit}".rstrip()


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high], steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / count))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with 2 and 5 times them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return ticks(low, high, 4)
