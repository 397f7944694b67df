"""`relayrl config show | check | schema SERVICE`: the settings as the service would read them."""

from __future__ import annotations

import argparse
import json
import os
from importlib import import_module
from typing import cast

from relayrl_shared import settings
from relayrl_shared.settings import Settings

_CLASSES = {
    "model-registry": ("relayrl_model_registry.settings", "ModelRegistrySettings"),
    "training-server": ("relayrl_training_server.settings", "TrainingServerSettings"),
    "inference-server": ("relayrl_inference_server.settings", "InferenceServerSettings"),
}


def settings_class(service: str) -> tuple[type[Settings], str]:
    """The settings struct of a service and the prefix of its environment variables."""
    module_name, class_name = _CLASSES[service]
    module = import_module(module_name)
    return cast("type[Settings]", getattr(module, class_name)), str(module.ENVIRONMENT_PREFIX)


def run(arguments: argparse.Namespace) -> int:
    """Prints, or raises ConfigError that says what is wrong."""
    cls, prefix = settings_class(arguments.service)
    if arguments.action == "schema":
        print(json.dumps(settings.json_schema(cls), indent=2))
        return 0
    effective = settings.settings_from_arguments(cls, arguments, prefix, os.environ)
    if arguments.action == "show":
        print(settings.as_json(effective).decode())
    else:
        print(f"{arguments.service}: {arguments.config or 'no file'}, environment and command line are valid")
    return 0
