"""Judges the features, and the registries that running processes serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from app.operations.doctor.facts import Line
from app.operations.findings import mixed_registries
from app.operations.samples import Sample


def diagnose_features(running: Sequence[Sample], disabled: Mapping[str, str]) -> Line:
    """Whether running processes can compute every feature, and which are disabled."""
    off = "; ".join(f"{name} is {how}" for name, how in disabled.items())
    looks = [look for sample in running if (look := sample.looks.get("features")) is not None]
    failing = sorted({look.detail for look in looks if look.state in ("degraded", "down")})
    if failing:
        remedy = "Mend the definition, or disable the feature: /admin/features or `profiles features disable NAME`."
        return Line("features", "bad", "; ".join([*failing, *filter(None, [off])]), remedy)
    if off:
        remedy = "Once it is mended, enable it: /admin/features or `profiles features enable NAME`."
        return Line("features", "warn", f"{off}; it is answered as null", remedy)
    fails = "none fails" if looks else "no process runs that computes them"
    return Line("features", "ok", f"{fails}, and none is disabled")


def diagnose_registry(own: str, running: Sequence[Sample]) -> Line:
    """Whether running processes serve one registry, the one with the fingerprint `own`, which the settings name."""
    for finding in mixed_registries(running):
        return Line("registry", "warn", finding.text[0].lower() + finding.text[1:-1], finding.advice)
    served = {sample.registry for sample in running if sample.registry}
    if not served:
        return Line("registry", "ok", f"{own} can be loaded; no running process says which one it serves")
    if served != {own}:
        text = f"running processes serve the registry {served.pop()}, and these settings name {own}"
        remedy = "That is expected before a release. Otherwise set PROFILES_FEATURES as the running processes have it."
        return Line("registry", "warn", text, remedy)
    return Line("registry", "ok", f"every running process serves {own}, as these settings say")
