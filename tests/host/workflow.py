"""Turn a saved workflow (what people drag into ComfyUI) into the prompt that /prompt takes, as the frontend does.

For plain graphs: no subgraphs, reroutes or muted nodes.
"""

from __future__ import annotations

from typing import Any

NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API prompt of a workflow; `object_info` is the server's answer to /object_info."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        info = object_info[node["type"]]
        inputs = dict(zip(widget_names(info), saved_values(info, node.get("widgets_values", []))))
        linked = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return prompt


def input_specs(info: dict[str, Any]) -> dict[str, list]:
    """All inputs of a node in the order in which the frontend lays them out."""
    groups = (info["input"].get("required", {}), info["input"].get("optional", {}))
    order = info.get("input_order") or {k: list(v) for k, v in info["input"].items()}
    names = [*order.get("required", []), *order.get("optional", [])]
    return {name: next(g[name] for g in groups if name in g) for name in names}


def is_widget(spec: list) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    return (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options.get("forceInput")


def widget_names(info: dict[str, Any]) -> list[str]:
    return [name for name, spec in input_specs(info).items() if is_widget(spec)]


def saved_values(info: dict[str, Any], values: list) -> list:
    """Saved widget values without the 'control after generate' one that follows a seed."""
    values, out = list(values), []
    for spec in filter(is_widget, input_specs(info).values()):
        if not values:
            break
        out.append(values.pop(0))
        if len(spec) > 1 and spec[1].get("control_after_generate"):
            values.pop(0)
    return out
