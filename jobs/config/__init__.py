"""The configuration: its schema, and how it is loaded."""

from jobs.config.load import checked, defaults_yaml, load_config, with_method
from jobs.config.schema import (
    AuditConfig,
    CodebookConfig,
    CompareConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    StorageConfig,
    TokensConfig,
    TrainConfig,
    WorkersConfig,
)

__all__ = [
    "AuditConfig",
    "CodebookConfig",
    "CompareConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "StorageConfig",
    "TokensConfig",
    "TrainConfig",
    "WorkersConfig",
    "checked",
    "defaults_yaml",
    "load_config",
    "with_method",
]
