"""The configuration: its schema, and how it is loaded."""

from jobs.config.load import (
    checked,
    defaults_yaml,
    find_config,
    load_config,
    to_yaml,
    typed_preprocess,
    with_method,
)
from jobs.config.renames import with_new_names
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
    "find_config",
    "load_config",
    "to_yaml",
    "typed_preprocess",
    "with_method",
    "with_new_names",
]
