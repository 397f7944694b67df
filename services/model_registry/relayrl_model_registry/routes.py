"""The registry's HTTP routes for people and their tools: policies, versions, aliases; driven by `app`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from relayrl_model_registry.store.interface import AliasMove, PolicySummary, PolicyVersion
from relayrl_model_registry.versions import Catalog

Limit = Annotated[int, Query(ge=1, le=1000)]


class AliasChange(BaseModel):
    """What PUT /v1/policies/{policy}/aliases/{alias} takes."""

    policy_version: int = Field(ge=1)
    reason: str = Field(min_length=1, max_length=1000)
    moved_by: str = Field(default="operator", min_length=1, max_length=200)


def create_router(catalog: Catalog) -> APIRouter:
    """The routes under /v1/policies; a policy name may hold one slash."""
    router = APIRouter(prefix="/v1/policies", tags=["policies"])
    _add_versions(router, catalog)
    _add_aliases(router, catalog)
    _add_policies(router, catalog)  # last: its path matches all the others
    return router


def _add_versions(router: APIRouter, catalog: Catalog) -> None:
    @router.get("/{policy:path}/versions")
    def list_versions(policy: str, before_version: int | None = None, limit: Limit = 100) -> dict[str, Any]:
        """Versions, newest first; the next page is below the last one's number."""
        return {"versions": [_version(v) for v in catalog.versions(policy, before_version, limit)]}

    @router.get("/{policy:path}/versions/{policy_version}")
    def get_version(policy: str, policy_version: int) -> dict[str, Any]:
        """One version with its manifest."""
        version = catalog.resolve(policy, policy_version)
        return _version(version) | {"manifest": msgspec.json.decode(version.manifest)}


def _add_aliases(router: APIRouter, catalog: Catalog) -> None:
    @router.get("/{policy:path}/aliases")
    def list_aliases(policy: str) -> dict[str, Any]:
        """Where every alias points."""
        return {"aliases": catalog.policy(policy).aliases}

    @router.get("/{policy:path}/aliases/{alias}")
    def get_alias(policy: str, alias: str, limit: Limit = 100) -> dict[str, Any]:
        """Where the alias points, and its history, newest first."""
        history = catalog.alias_history(policy, alias, limit)
        return _alias(history[0]) | {"history": [msgspec.to_builtins(move) for move in history]}

    @router.put("/{policy:path}/aliases/{alias}")
    def put_alias(policy: str, alias: str, change: AliasChange) -> dict[str, Any]:
        """Promotes or rolls back: points the alias to another version and says why."""
        move = catalog.move_alias(
            policy, alias, change.policy_version, moved_by=change.moved_by, reason=change.reason
        )
        return _alias(move) | {"move": msgspec.to_builtins(move)}


def _add_policies(router: APIRouter, catalog: Catalog) -> None:
    @router.get("")
    def list_policies() -> dict[str, Any]:
        """All policies by name."""
        return {"policies": [_policy(summary) for summary in catalog.policies()]}

    @router.get("/{policy:path}")
    def get_policy(policy: str) -> dict[str, Any]:
        """One policy and its aliases."""
        return _policy(catalog.policy(policy))


def _policy(summary: PolicySummary) -> dict[str, Any]:
    return dict(msgspec.to_builtins(summary))


def _version(version: PolicyVersion) -> dict[str, Any]:
    fields = msgspec.structs.asdict(version)
    del fields["manifest"]
    return fields


def _alias(move: AliasMove) -> dict[str, Any]:
    return {"policy": move.policy, "alias": move.alias, "policy_version": move.to_version}
