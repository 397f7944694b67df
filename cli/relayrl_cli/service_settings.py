"""What a stack tells each service: ports, directories, store; the same whether in processes or in one.

Each is a mapping of dotted settings key → text, as `--set` takes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relayrl_cli.addresses import LOOPBACK, Ports

Overrides = dict[str, str]


def default_store(directory: Path) -> str:
    """SQLite below the directory of the stack."""
    return f"sqlite:///{directory / 'training-server'}"


def service_settings(directory: Path, ports: Ports, store: str) -> dict[str, Overrides]:
    """By service, in the order in which they start."""
    return {
        "model_registry": _registry(directory, ports, store),
        "training_server": _training(directory, ports, store),
        "inference_server": _inference(ports),
    }


def _registry(directory: Path, ports: Ports, store: str) -> Overrides:
    """With Postgres its rows are in that database too, in tables of their own; its files are never."""
    shared = {"database_url": store} if store.startswith(("postgresql://", "postgres://")) else {}
    return {
        **shared,
        "directory": str(directory / "registry"),
        "model_server.port": str(ports.model_server),
        "model_announcer.port": str(ports.model_announcer),
        "http.port": str(ports.registry_http),
    }


def _training(directory: Path, ports: Ports, store: str) -> Overrides:
    server, addresses = "training_server_config", "transport_config.zmq_addresses.training_addresses"
    return {
        f"{server}.directory": str(directory / "training-server"),
        f"{server}.store": store,
        f"{server}.http.port": str(ports.training_http),
        f"{server}.ingest.http.port": str(ports.ingest_http),
        f"{addresses}.agent_listener_address.port": str(ports.agent_listener),
        f"{addresses}.trajectory_server_address.port": str(ports.trajectory_server),
        f"{addresses}.model_server_address.port": str(ports.model_server),
    }


def _inference(ports: Ports) -> Overrides:
    return {
        "inference_server.port": str(ports.inference_server),
        "model_server.port": str(ports.model_server),
        "model_announcer.port": str(ports.model_announcer),
        "http.port": str(ports.inference_http),
    }


def client_config(directory: Path, ports: Ports) -> dict[str, Any]:
    """`client_config.json` for applications of a stack on this machine."""
    return {
        "client_config": {"spool": {"directory": str(directory / "client" / "spool")}},
        "transport_config": {
            "zmq_addresses": {
                "inference_addresses": {"inference_server_address": _address(ports.inference_server)},
                "training_addresses": {
                    "model_server_address": _address(ports.model_server),
                    "model_announcer_address": _address(ports.model_announcer),
                    "trajectory_server_address": _address(ports.trajectory_server),
                    "agent_listener_address": _address(ports.agent_listener),
                },
            }
        },
    }


def _address(port: int) -> dict[str, Any]:
    return {"host": LOOPBACK, "port": port}
