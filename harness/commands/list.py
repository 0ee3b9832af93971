"""`list`: what can be named on the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from harness.errors import UserError


def list_(
    kind: Annotated[str, typer.Argument(help="methods, rewards, suites, models or presets.")],
) -> None:
    """List what can be named on the command line."""
    from harness.errors import nearest
    from harness.registry import discover, embedded_models, find_model, pipeline_classes

    if kind in ("methods", "rewards", "suites"):
        rows = [(p.name, _tags(p.attributes), p.description) for p in discover(kind).values()]
    elif kind == "models":
        rows = [(name, "embedded", str(path)) for name, path in embedded_models().items()]
        rows += [(find_model("gaussian").name, "test", "closed-form Gaussian, no weights")]
        rows += [("PATH", "", f"a directory as diffusers saves a {p}, or a hub id") for p in pipeline_classes()]
    elif kind == "presets":
        from harness.config import load_yaml, presets

        rows = [(name, "", str(load_yaml(path, "preset").get("description", ""))) for name, path in presets().items()]
    else:
        known = ["methods", "rewards", "suites", "models", "presets"]
        raise UserError(f"there is no list of {kind!r}; {nearest(kind, known)}")
    width = max(len(name) for name, _, _ in rows)
    tag_width = max(len(tags) for _, tags, _ in rows)
    for name, tags, description in rows:
        typer.echo(f"{name:<{width}}  {tags:<{tag_width}}  {description}".rstrip())


def _tags(attributes: dict[str, Any]) -> str:
    tags = [
        str(attributes.get("role", attributes.get("kind", ""))),
        f"v{attributes['version']}" if "version" in attributes else "",
    ]
    if attributes.get("needs_reward_gradient"):
        tags.append("needs the reward's gradient")
    if attributes.get("differentiable") is False:
        tags.append("not differentiable")
    if attributes.get("family") == "named":
        tags.append("when named")
    return ", ".join(tag for tag in tags if tag)
