"""Numbers and names of CapFilt's reports, as people read them."""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seconds(value: float) -> str:
    """Return a time in the unit that suits it."""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def rate(value: float) -> str:
    """Return a number per second; a slow one keeps two digits."""
    return f"{value:,.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def spoken(name: str) -> str:
    """Return a name of the data, such as a drop reason, with spaces between its words."""
    return name.replace("_", " ")


def noise_name(noise: str) -> str:
    """Return the name of a kind of planted noise, for reading."""
    return "true" if noise == "none" else spoken(noise)
