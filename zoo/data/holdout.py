"""How many normal images a fit holds out for its thresholds."""

SHARE, LEAST = 0.1, 20


def held_out(normals: int) -> int:
    """At least 20 or a tenth of the normals, but never more than a half: a fit of few images needs them more."""
    return min(max(LEAST, round(SHARE * normals)), normals // 2)
