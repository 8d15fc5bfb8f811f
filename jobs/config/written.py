"""Settings as the user wrote them, for artifacts."""

from typing import Any

from omegaconf import OmegaConf


def with_written(settings: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """Nested settings, with these keys as they are written."""
    if not written:
        return settings
    given = OmegaConf.create(settings)
    for key, text in written.items():
        if OmegaConf.select(given, key, throw_on_missing=False) is not None:
            OmegaConf.update(given, key, text)
    return OmegaConf.to_container(given, resolve=False)  # type: ignore[return-value]
